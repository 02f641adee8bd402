"""SHA-256 checks of model files, in sha256sum's format."""

import hashlib
import re
from pathlib import Path


def verify_sha256sums(folder: Path) -> int:
    """Check every file of `folder` against its SHA256SUMS, lines `<sha256>  <relative name>`; returns how many.

    Hidden files are left aside. Raises ValueError naming each file that is missing, differs or is not listed,
    and for a line that cannot be read; FileNotFoundError when there is no SHA256SUMS.
    """
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        raise FileNotFoundError(
            f"{folder.name}/SHA256SUMS is missing, so the files cannot be checked: restore the folder"
        )
    expected = {}
    for number, line in enumerate(sums.read_text(encoding="utf-8").splitlines(), start=1):
        parts = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if not parts or Path(parts[2]).is_absolute() or ".." in Path(parts[2]).parts:
            raise ValueError(f"{folder.name}/SHA256SUMS line {number} is not `<sha256>  <relative name>`: {line!r}")
        expected[Path(parts[2]).as_posix()] = parts[1]
    present = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path != sums)
    visible = {name.as_posix() for name in present if not any(part.startswith(".") for part in name.parts)}
    if unlisted := sorted(visible - expected.keys()):
        raise ValueError(f"{folder.name}: {', '.join(unlisted)}: not listed in SHA256SUMS. Remove or list these files")
    verify_files(folder, expected)
    return len(expected)


def verify_files(folder: Path, expected: dict[str, str]) -> None:
    """Check files of `folder` against {relative name: SHA-256 in hex}. Raises ValueError that names every
    wrong one."""
    wrong = []
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
            continue
        found = sha256(path)
        if found != digest:
            wrong.append(f"{name} ({path.stat().st_size} bytes) has SHA-256 {found}, expected {digest}")
    if wrong:
        raise ValueError(
            f"{folder.name} is refused: {'; '.join(wrong)}. The files are damaged or changed: restore or reinstall them"
        )


def sha256(path: Path) -> str:
    """Of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
