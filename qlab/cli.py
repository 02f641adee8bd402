"""qlab: the command line. Arguments only; what they do is in the package.

qlab merge BASE ADAPTER OUT     a base checkpoint and a PEFT adapter become one checkpoint (qlab.adapters.merge_checkpoint)
"""

import argparse
import sys

HOW = ("dequantize", "original", "requantize")
DTYPES = ("float32", "float16", "bfloat16")


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    main = argparse.ArgumentParser(
        prog="qlab", description="Quantization of language models and what is trained on it."
    )
    commands = main.add_subparsers(dest="command", required=True)
    merge = commands.add_parser(
        "merge",
        help="merge a PEFT LoRA adapter into a checkpoint",
        description="Merge a PEFT LoRA adapter into its base, tensor by tensor, and write a checkpoint that "
        "AutoModelForCausalLM.from_pretrained opens. The adapter's folder does not say how its base was quantized (unless qlab "
        "wrote it): --base-quant does.",
    )
    merge.add_argument(
        "base", help="folder or Hub id of the base model: safetensors, float or quantized by bitsandbytes"
    )
    merge.add_argument("adapter", help="folder with adapter_config.json and adapter_model.safetensors")
    merge.add_argument("out", help="folder to write; it must not exist, or be empty")
    merge.add_argument(
        "--how",
        choices=HOW,
        default="dequantize",
        help="dequantize (default): the base as it was quantized in training plus the adapter, in floating point: exactly what "
        "was trained. original: the weights on disk plus the adapter. requantize: the first, quantized again",
    )
    merge.add_argument("--dtype", choices=DTYPES, help="of the floating-point tensors written (default: as the base)")
    merge.add_argument(
        "--base-quant",
        choices=("nf4", "fp4", "int8", "none"),
        help="how the base was quantized while the adapter was trained (default: none, or what its files say)",
    )
    merge.add_argument("--double-quant", action="store_true", default=None, help="bnb_4bit_use_double_quant was on")
    merge.add_argument(
        "--block-size", type=int, metavar="N", help="weights that share a scale, of nf4 and fp4 (default: 64)"
    )
    merge.add_argument("--base-dtype", choices=DTYPES, help="dtype that the base was loaded in (default: as on disk)")
    merge.add_argument(
        "--skip-modules",
        metavar="NAME,…",
        type=lambda names: names.split(","),
        help="llm_int8_skip_modules that the base was loaded with (default: transformers' own choice)",
    )
    merge.add_argument(
        "--dry-run", action="store_true", help="say what would be done and what Δ would survive; write nothing"
    )
    merge.add_argument(
        "--verify",
        choices=("layers", "model", "none"),
        default="layers",
        help="layers (default): read every tensor again, compare every merged layer with base and adapter on random inputs. "
        "model: compare logits too, with each model in memory whole",
    )
    return main


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns 0, or 1 after an error, which is printed in one paragraph; argparse exits with 2 by itself."""
    given = vars(parser().parse_args(arguments))
    run = {"merge": _merge}[given.pop("command")]
    try:
        run(given)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        print("\n".join([f"qlab: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("qlab: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return 0


def _merge(given: dict) -> None:
    import torch  # here, so that --help and wrong arguments answer at once

    from qlab.adapters.merge_checkpoint import merge_checkpoint

    for name in ("dtype", "base_dtype"):
        given[name] = given[name] and getattr(torch, given[name])
    merge_checkpoint(**given, progress=sys.stderr.isatty())


if __name__ == "__main__":
    sys.exit(main())
