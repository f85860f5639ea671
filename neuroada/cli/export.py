"""Write an adapter as one of PEFT's SHiRA: plain PEFT loads it, with nothing of this package installed.

neuroada export --adapter runs/llama7b_math/adapter --as shira --out exported

The same outputs, in a file of about five times the size.
"""

import argparse
from pathlib import Path

from neuroada.cli.command import Parser
from neuroada.errors import UserError


def main(argv: list[str]) -> None:
    parser = Parser(prog="neuroada export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="the adapter's folder")
    parser.add_argument("--as", dest="kind", choices=("shira",), required=True, help="the form to write")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write; must not exist")
    parser.add_argument("--base-model", metavar="DIR_OR_ID", help="default: the one adapter_config.json names")
    args = parser.parse_args(argv)
    if not (args.adapter / "adapter_config.json").is_file():
        raise UserError(f"--adapter {args.adapter}: no adapter_config.json there; give a trained adapter's folder")

    from neuroada.adapter.export import export_shira
    from neuroada.hf.tensor_files import Checkpoint, resolve
    from neuroada.offline.merge import base_of

    source, revision = base_of(args.adapter) if args.base_model is None else (args.base_model, None)
    base = Checkpoint(resolve(source, "--base-model", revision), "--base-model ")
    if base.has_conv1d:
        raise UserError(f"--adapter {args.adapter}: adapts Conv1D layers, which SHiRA does not; use `neuroada merge`")
    widths = {
        name.removesuffix(".weight"): tensor.shape[1]
        for name, tensor in base.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    }
    r = export_shira(args.adapter, args.out, widths)
    print(f"{args.out}: SHiRA, r = {r}; PeftModel.from_pretrained(model, {str(args.out)!r}) loads it")
