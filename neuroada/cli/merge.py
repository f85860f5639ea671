"""Merge an adapter into its base model: shard in, shard out, in the memory of a block of rows.

    neuroada merge --adapter runs/llama7b_math/adapter --out models/llama7b_math
    neuroada merge --unmerge --model models/llama7b_math --out models/llama7b_again

The result is an ordinary Hugging Face folder in the base's dtype; with --into quantised, one as `neuroada quantise`
writes it. The base is never touched.
"""

import argparse
import json
from pathlib import Path

from neuroada.cli.command import Parser
from neuroada.errors import UserError
from neuroada.files import check_free


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, as far as they can be judged without a heavy import."""
    parser = Parser(prog="neuroada merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="the adapter's folder (any of PEFT's methods)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write; must not exist")
    parser.add_argument("--base-model", metavar="DIR_OR_ID", help="default: the one adapter_config.json names")
    parser.add_argument(
        "--into",
        choices=("dequantised", "original", "quantised"),
        default="dequantised",
        help="of an adapter of a quantised base: the weights it was trained on, made dense (default) or quantised as "
        "they are, its values exact beside the codes; or the original ones",
    )
    parser.add_argument("--verify", action="store_true", help="compare logits before finishing (loads the whole model)")
    parser.add_argument(
        "--keep-base",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the base values under the connections in OUT/unmerge, for --unmerge (default: yes)",
    )
    parser.add_argument("--unmerge", action="store_true", help="write the base of --model again, to the bit")
    parser.add_argument("--model", type=Path, metavar="DIR", help="of --unmerge: a folder that merge.py wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.unmerge:
        if args.model is None or args.adapter or args.base_model or args.verify:
            raise UserError("--unmerge: takes --model DIR and --out DIR alone")
        if not args.model.is_dir():
            raise UserError(f"--model {args.model}: no such folder; give one that merge.py wrote")
    elif args.adapter is None or args.model is not None:
        raise UserError("--adapter DIR is what to merge (--model belongs to --unmerge)")
    elif not (args.adapter / "adapter_config.json").is_file():
        raise UserError(f"--adapter {args.adapter}: no adapter_config.json there; give a trained adapter's folder")
    if args.base_model and args.base_model.startswith((".", "/", "~")) and not Path(args.base_model).is_dir():
        raise UserError(f"--base-model {args.base_model}: no such folder; give one with safetensors in it, or a hub id")
    check_free(args.out, "--out ")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.unmerge:
        from neuroada.offline.merge import unmerge

        done = unmerge(args.model, args.out, progress=not args.json)
    else:
        from neuroada.hf.tensor_files import resolve
        from neuroada.offline.merge import base_of, merge

        source, revision = base_of(args.adapter) if args.base_model is None else (args.base_model, None)

        base = resolve(source, "--base-model", revision)
        options = {
            "keep_base": args.keep_base,
            "verify": args.verify,
            "progress": not args.json,
            "into": args.into,
        }
        done = merge(args.adapter, base, args.out, **options)
    if args.json:
        print(json.dumps(done))
    else:
        for name, value in done.items():
            print(f"{name:17} {value}" if isinstance(value, str | bool) else f"{name:17} {value:,}")
