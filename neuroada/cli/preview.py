"""The first examples of own data as the model will see them, and what the data come to. No weight is loaded.

    neuroada preview --recipe mine.yaml [-n 5] [key=value ...] [--json]

Learnt tokens are bold green, those that are only read are dim, those that train.max_length leaves out are red; in a
file or a pipe they stand in «» and ~~.
"""

import argparse
import json
from pathlib import Path

from neuroada.cli.command import Parser
from neuroada.config.recipe import load_recipe
from neuroada.errors import UserError


def main(argv: list[str]) -> None:
    parser = Parser(prog="neuroada preview", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a name in recipes/, or a YAML file")
    parser.add_argument("-n", type=int, default=5, metavar="N", help="examples of each source (default 5)")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object, and no examples")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.train_on=last_assistant")
    args = parser.parse_intermixed_args(argv)
    recipe = load_recipe(args.recipe, args.overrides)
    if recipe.data is None:
        raise UserError(f"--recipe {args.recipe}: preview shows own data, and this recipe has task: {recipe.task}")

    from rich.console import Console

    from neuroada.data import prepare
    from neuroada.data.encode_source import SourceEncoder
    from neuroada.data.preview import print_examples, print_summary
    from neuroada.data.summary import summarise
    from neuroada.hf.loading import load_tokenizer

    data, train, cache = recipe.data, recipe.train, Path(recipe.data_dir) / ".tokens"
    tokenizer, console = load_tokenizer(recipe.model), Console(markup=False, emoji=False)
    if not args.json:
        print_examples(SourceEncoder(data, tokenizer, train.max_length, cache), args.n, console)
    needed = train.max_steps and train.max_steps * train.global_batch_size
    prepared = prepare(data, tokenizer, train.max_length, train.seed, cache, train.packing == "fill", needed)
    paths = [spec.path for spec in data.datasets]
    summary = summarise(prepared, paths, train.global_batch_size, train.micro_batch_size)
    if args.json:
        print(json.dumps(summary.to_json(), indent=2))
    else:
        print_summary(summary, console)
