"""qlab: the command line. Arguments only; what they do is in the package.

qlab finetune --model … --method … --data … --out …     train an adapter (qlab.train.finetune)
qlab merge BASE ADAPTER OUT     a base checkpoint and a PEFT adapter become one checkpoint (qlab.adapters.merge_checkpoint)
"""

import argparse
import os
import sys
import warnings

HOW = ("dequantize", "original", "requantize")
METHODS = ("lora", "qlora", "qalora", "qat-lora", "bitfit")
DTYPES = ("float32", "float16", "bfloat16")


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    main = argparse.ArgumentParser(
        prog="qlab", description="Quantization of language models and what is trained on it."
    )
    commands = main.add_subparsers(dest="command", required=True)
    _add_finetune(commands)
    _add_merge(commands)
    return main


def _add_finetune(commands) -> None:
    """What is not given is not passed on: the defaults are those of qlab.train.finetune.Settings."""
    fine = commands.add_parser(
        "finetune",
        help="train an adapter on a language model, or on an encoder with a head",
        description="Fine-tune a causal language model on prompts and answers or on text, or an encoder on labelled texts. "
        "OUT gets adapter/ and record.json; after a kill, the same command with --resume goes on from the last checkpoint. "
        "On several GPUs: torchrun --nproc_per_node 8 -m qlab.cli finetune …",
        argument_default=argparse.SUPPRESS,
    )
    needed = fine.add_argument_group("what to train on what")
    needed.add_argument("--model", required=True, help="qlab-mini, all-MiniLM-L6-v2, a folder, or a Hub id")
    needed.add_argument(
        "--method",
        required=True,
        choices=METHODS,
        help="lora: on the base as it is. qlora: on a base of 4 bits (NF4) or other integers. qalora: on integers, and merges "
        "into their zero points. qat-lora: W + ΔW rounded in each step. bitfit: only biases, on a base as qlora's",
    )
    needed.add_argument(
        "--data",
        required=True,
        help='UTF-8: JSONL of {"prompt": …, "answer": …}, of {"text": …, "label": …} (an encoder), or of {"text": …}; or a .txt '
        'file. An answer follows its prompt as it is (begin it with a space), then the tokenizer\'s end of text, or "stop"',
    )
    needed.add_argument("--out", required=True, help="folder to write; it must not exist, or be empty, unless --resume")
    needed.add_argument("--eval-data", help="rows of the same kind, scored every --eval-steps and at the end")
    base = fine.add_argument_group("the base and its rounding")
    base.add_argument("--bits", type=int, help="1 to 8 (default: 4; not for lora)")
    base.add_argument(
        "--group-size", type=int, metavar="N", help="integers that share a scale and a zero point (default: 32)"
    )
    base.add_argument("--block-size", type=int, metavar="N", help="NF4 codes that share a scale (default: 64)")
    base.add_argument(
        "--no-double-quant", dest="double_quant", action="store_false", help="keep NF4's scales in float32"
    )
    base.add_argument("--dtype", choices=DTYPES, help="of the weights that are not rounded (default: float32)")
    base.add_argument(
        "--bitsandbytes",
        action=argparse.BooleanOptionalAction,
        help="NF4 by transformers and bitsandbytes (default: on CUDA only)",
    )
    adapter = fine.add_argument_group("the adapter")
    adapter.add_argument("--r", type=int, help="rank (default: 8)")
    adapter.add_argument("--lora-alpha", type=float, help="ΔW is B·A times this over r (default: 16)")
    adapter.add_argument("--lora-dropout", type=float, help="share of the adapter's inputs set to 0 (default: 0)")
    adapter.add_argument(
        "--targets",
        type=_targets,
        metavar="NAME,…",
        help="layers: ends of their names, or a regular expression (default: all-linear)",
    )
    run = fine.add_argument_group("the run")
    run.add_argument(
        "--lr",
        type=float,
        help="the highest learning rate (default: what suits qlab-mini; 1e-4 to 2e-4 is usual for LoRA at 7B and more)",
    )
    length = run.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimizer steps")
    length.add_argument("--epochs", type=float, help="passes over the data (default: 1)")
    run.add_argument("--batch-size", type=int, metavar="N", help="rows a forward, for each process (default: 32)")
    run.add_argument("--grad-accum", type=int, metavar="N", help="forwards a step (default: 1)")
    run.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of a row (default: the model's limit, at most 1024)"
    )
    run.add_argument("--seed", type=int, help="of adapters, order and dropout (default: 0)")
    run.add_argument("--save-steps", type=int, metavar="N", help="steps between checkpoints (default: 100)")
    run.add_argument("--eval-steps", type=int, metavar="N", help="steps between evaluations (default: 100)")
    run.add_argument("--compute", choices=("float32", "bfloat16"), help="bfloat16: by autocast (default: float32)")
    run.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    run.add_argument("--activation-checkpointing", action="store_true", help="less memory, a third more time")
    run.add_argument("--fsdp", action="store_true", help="under torchrun: shard the model over the processes (FSDP2)")
    run.add_argument("--resume", action="store_true", default=False, help="go on with the run in OUT")


def _targets(names: str) -> str | tuple[str, ...]:
    """Ends of names as a tuple; "all-linear" and what only a regular expression has, as it is."""
    return names if names == "all-linear" or set(names) & set("*+?()[]{}|\\^$") else tuple(names.split(","))


def _add_merge(commands) -> None:
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


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns 0, or 1 after an error, which is printed in one paragraph; argparse exits with 2 by itself."""
    given = vars(parser().parse_args(arguments))
    run = {"finetune": _finetune, "merge": _merge}[given.pop("command")]
    try:
        run(given)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        print("\n".join([f"qlab: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"qlab: {error or 'interrupted; nothing was left behind'}", file=sys.stderr)
        return 130
    return 0


def _finetune(given: dict) -> None:
    from qlab.train.finetune import Settings, finetune  # here, so that --help and wrong arguments answer at once

    resume = given.pop("resume")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of libraries, about each other
        warnings.showwarning = lambda message, *_, **__: print(f"qlab: {message}", file=sys.stderr)
        result = finetune(Settings(**given), resume=resume, progress=sys.stderr.isatty())
    if int(os.environ.get("RANK", 0)) == 0:
        record = result.record
        scores = {**record["curve"][-1], **(record["evaluations"] or [{}])[-1]}
        shown = [
            f"{name} {scores[name]:.4g}" for name in ("loss", "exact_match", "accuracy", "perplexity") if name in scores
        ]
        print(
            f"{result.folder / 'adapter'}: {', '.join(shown)} after {record['steps']} steps and {record['seconds']:.0f} s"
        )


def _merge(given: dict) -> None:
    import torch  # here, so that --help and wrong arguments answer at once

    from qlab.adapters.merge_checkpoint import merge_checkpoint

    for name in ("dtype", "base_dtype"):
        given[name] = given[name] and getattr(torch, given[name])
    merge_checkpoint(**given, progress=sys.stderr.isatty())


if __name__ == "__main__":
    sys.exit(main())
