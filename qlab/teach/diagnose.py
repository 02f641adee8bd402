"""What is wrong with an answer: the reasons behind `check`, tried from the plainest to the subtlest."""

import torch

from qlab.teach.cards import plain


def diagnose(answer, expected, inputs, suspects, tolerance):
    """None where the answer is right, else lines that say what is wrong. See exercises.check."""
    if callable(expected):
        if not callable(answer):
            return [f"A function is asked for; this is {_kind(answer)}."]
        if not inputs:
            raise ValueError("check of a function needs inputs=[(argument, ...), ...] to call it with")
        pairs = []
        for args in inputs:
            try:
                got = answer(*_copies(args))
            except Exception as error:
                return [f"It raised {type(error).__name__}: {error}", f"when called with {_show(args)}."]
            pairs.append((args, got, expected(*_copies(args))))
    else:
        pairs = [((), answer, expected)]
    wrong = [(args, got, want) for args, got, want in pairs if not _same(got, want, tolerance)]
    if not wrong:
        return None
    for reason, suspect in suspects.items():
        if all(
            _same(got, suspect(*_copies(args)) if callable(suspect) else suspect, tolerance) for args, got, _ in pairs
        ):
            return [reason]
    args, got, want = wrong[0]
    where = [f"First wrong for the input {_show(args)}."] if args else []
    count = [f"{len(pairs) - len(wrong)} of {len(pairs)} inputs come out right."] if len(pairs) > 1 else []
    return [*reasons(got, want), *where, *count]


def reasons(got, want):
    """Lines on how `got` differs from `want` (a number, a tensor, or a tuple of them), which it does."""
    if got is None:
        return ["It gave None: write your code in place of the stub, and return the result."]
    if isinstance(want, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(got) != len(want):
            return [f"{len(want)} values are asked for; this is {_kind(got)}."]
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            if not _same(g, w, 0.0):
                return [f"Value {i + 1} of {len(want)}: {line}" for line in reasons(g, w)]
    if isinstance(want, (str, bool)) or isinstance(got, bool) or not isinstance(got, (int, float, torch.Tensor)):
        return [f"Expected {plain(want)}; this is {_kind(got)}."]
    g, w = (torch.as_tensor(v) for v in (got, want))
    if g.shape != w.shape:
        hint = " It is the transpose." if g.ndim == 2 and g.T.shape == w.shape and torch.equal(g.T.to(w), w) else ""
        return [f"Wrong shape: expected {tuple(w.shape)}, got {tuple(g.shape)}.{hint}"]
    g, w = g.detach().double().flatten(), w.detach().double().flatten()
    bad = int((~torch.isfinite(g) & torch.isfinite(w)).sum())
    if bad:
        return [f"{bad} of {g.numel()} numbers are NaN or infinite. A division by zero is the usual cause."]
    return _numeric(g, w)


def _numeric(g, w):
    n, off = g.numel(), g != w
    if torch.allclose(g, -w, rtol=1e-6, atol=0):
        return ["The sign is turned around: every number is the negative of the expected one."]
    if n > 1 and g.ndim and torch.equal(g.sort().values, w.sort().values):
        return ["The right numbers in the wrong order (a transpose, a reversed axis?)."]
    shift = g - w
    if n > 1 and shift.std() < 1e-9 + 1e-6 * shift.abs().mean():
        return [f"Every number is off by the same amount, {plain(float(shift.mean()))}."]
    big = w.abs() > 0
    ratio = g[big] / w[big]
    if n > 1 and len(ratio) > 1 and ratio.std() < 1e-5 * ratio.abs().mean():
        return [f"Every number is {plain(float(ratio.mean()))} times the expected one."]
    lines = []
    whole = bool((w == w.round()).all())
    if whole and not (g == g.round()).all():
        lines.append("Whole numbers (codes) are asked for; some of these have a fraction.")
    if n > 1 and (g.max() != w.max() or g.min() != w.min()):
        lines.append(
            f"The range differs: expected {plain(float(w.min()))} to {plain(float(w.max()))}, "
            f"got {plain(float(g.min()))} to {plain(float(g.max()))}."
        )
    elif whole and n > 1 and (shift[off].abs() == 1).all():
        lines.append(
            "The wrong ones are off by exactly one code: look at how ties are rounded (torch.round takes the "
            "even neighbour) and at truncation."
        )
    first = int(off.nonzero()[0, 0])
    lines.append(
        f"{int(off.sum())} of {n} numbers differ; the first is number {first}: expected "
        f"{plain(float(w[first]))}, got {plain(float(g[first]))}."
    )
    return lines


def _same(got, want, tolerance):
    if isinstance(want, (tuple, list)):
        return (
            isinstance(got, (tuple, list))
            and len(got) == len(want)
            and all(_same(g, w, tolerance) for g, w in zip(got, want, strict=True))
        )
    if isinstance(want, (str, bool)) or want is None:
        return type(got) is type(want) and got == want
    if not isinstance(got, (int, float, torch.Tensor)) or isinstance(got, bool):
        return False
    g, w = torch.as_tensor(got), torch.as_tensor(want)
    if g.shape != w.shape:
        return False
    g, w = g.detach().double(), w.detach().double()
    return bool((((g - w).abs() <= tolerance) | (g == w) | (g.isnan() & w.isnan())).all())


def _copies(args):
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in args]


def _kind(value):
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return (
        f"{type(value).__name__} {value!r}"
        if value is None or isinstance(value, (int, float, str, bool))
        else f"a {type(value).__name__}"
    )


def _show(args):
    return ", ".join(
        f"tensor{tuple(a.shape)} {[float(f'{v:.3g}') for v in a.flatten()[:4].tolist()]}{'…' if a.numel() > 4 else ''}"
        if isinstance(a, torch.Tensor)
        else repr(a)
        for a in args
    )
