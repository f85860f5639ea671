"""Submit a recipe to SLURM: checks it, prints the exact sbatch line, and submits it with --yes.

neuroada submit --recipe llama13b_math --nodes 2 --gpus-per-node 4 --time 12:00:00 [key=value ...] --yes
neuroada submit --recipe llama13b_math --gpus-per-node 8 --sweep train.seed=1,2,3 adapter.k=1,20
neuroada submit --recipe llama13b_math --gpus-per-node 8 --sbatch=--partition=a100 --sbatch=--account=me
neuroada submit --recipe llama33_70b_math --gpus-per-node 8 --gpu-memory 80

With --gpu-memory and without --nodes, the planner finds the fewest nodes on which the recipe's strategy fits the cards;
with both, it checks that it does.
"""

import argparse
import itertools
import shlex
import shutil
from pathlib import Path

from neuroada.cli.command import Parser
from neuroada.config.recipe import Recipe, load_recipe
from neuroada.errors import UserError
from neuroada.hf.loading import check_source
from neuroada.tasks.table import get_task

REPOSITORY = Path(__file__).resolve().parents[2]


def main(argv: list[str]) -> None:
    parser = Parser(prog="neuroada submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a name in recipes/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.lr=1e-3")
    parser.add_argument("--nodes", type=int, help="default: 1, or what --gpu-memory asks for")
    ranks = parser.add_mutually_exclusive_group(required=True)
    ranks.add_argument("--gpus-per-node", type=int, metavar="N", help="one rank for each GPU")
    ranks.add_argument("--ntasks-per-node", type=int, metavar="N", help="ranks without GPUs")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of one card: size the job with the planner")
    parser.add_argument("--time", help="limit of the job, as sbatch takes it: 12:00:00")
    parser.add_argument(
        "--sweep", nargs="+", default=[], metavar="key=a,b", help="one array task for each combination of the values"
    )
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="passed on: --sbatch=--mem=64G")
    parser.add_argument("--yes", action="store_true", help="submit, do not only print")
    args = parser.parse_intermixed_args(argv)
    if Path.cwd() != REPOSITORY:
        raise UserError(f"{Path.cwd()}: submit from {REPOSITORY}, where the job runs and relative paths start")

    per_node = args.ntasks_per_node if args.gpus_per_node is None else args.gpus_per_node
    sizes = {"nodes": args.nodes, "gpus-per-node or ntasks-per-node": per_node, "gpu-memory": args.gpu_memory}
    for field, value in sizes.items():
        if value is not None and value < 1:
            raise UserError(f"--{field}: {value} is not allowed; give at least 1")
    recipe = load_recipe(args.recipe, args.overrides)
    nodes = args.nodes or 1
    if args.gpu_memory is not None:
        nodes = fit(recipe, args.nodes, per_node, args.gpu_memory)
    tasks = sweep(recipe, args.sweep)
    for task in tasks or [[]]:
        asked = load_recipe(args.recipe, [*args.overrides, *task])
        asked.micro_batches(nodes * per_node)
        check_ranks(asked, nodes * per_node)

    options = [f"--nodes={nodes}", f"--ntasks-per-node={per_node}", f"--job-name={Path(recipe.output_dir).name}"]
    options += [f"--gpus-per-node={args.gpus_per_node}"] if args.gpus_per_node else []
    options += [f"--time={args.time}"] if args.time else []
    options += [f"--array=0-{len(tasks) - 1}"] if tasks else []
    options += [f"--output={recipe.output_dir}/slurm-{'%A_%a' if tasks else '%j'}.out"]
    command = ["sbatch", *options, *args.sbatch, "launch/slurm/train.sbatch", args.recipe, *args.overrides]
    command += [part for task in tasks for part in ("--", *task)]
    print(shlex.join(command))
    if not args.yes:
        print("add --yes to submit it")
        return
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: no such command here; submit from a login node of the cluster")
    import subprocess  # after neuroada.cli.command, which makes it importable beside launch/select.py

    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)  # SLURM makes no folder for --output
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise UserError(f"sbatch refused: {done.stderr}")
    print(done.stdout, end="")


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """UserError where the engine, the task or a local model do not fit a job of `ranks` ranks."""
    if recipe.task is not None:
        get_task(recipe.task)
    check_source(recipe.model)
    if recipe.engine.name == "single" and ranks > 1:
        raise UserError(f"engine.name = single: not on {ranks} ranks; use engine.name=deepspeed or fsdp2")


def fit(recipe: Recipe, nodes: int | None, per_node: int, gib: float) -> int:
    """The fewest nodes, or the given number, on which the recipe's own strategy fits cards of `gib` GiB.

    Raises:
        UserError: it fits on none; what would is told.
    """
    from neuroada.planning.plan import GIB, make_plan, needed

    batch = recipe.train.global_batch_size
    tried = (
        [nodes] if nodes else [count for count in range(1, batch // per_node + 1) if batch % (count * per_node) == 0]
    )
    if not tried:
        raise UserError(
            f"train.global_batch_size = {batch}: does not divide over {per_node} ranks of a node; set it to a multiple"
        )
    shards = recipe.engine.shard_size or 1
    tried = [count for count in tried if count * per_node % shards == 0] or tried  # else the plan says why
    for count in tried:
        plan = make_plan(recipe, count * per_node)
        wanted = needed(plan.chosen.memory.peak_bytes) / GIB
        if wanted <= gib:
            print(f"plan: {wanted:.1f} GiB a card with {plan.chosen.strategy} on {count} node(s) of {per_node}")
            return count
    better = make_plan(recipe, tried[-1] * per_node, gib * GIB).chosen.strategy  # or says what would fit
    raise UserError(
        f"--gpu-memory {gib:g}: {plan.chosen.strategy} needs {wanted:.1f} GiB a card on {tried[-1]} node(s) of "
        f"{per_node}; set {_fields(recipe, better)}"
    )


def _fields(recipe: Recipe, strategy: str) -> str:
    """The overrides that give the recipe another strategy, of the planner's names."""
    wanted = {"name": "fsdp2"} if strategy == "fsdp2" else {"name": "deepspeed", "ds_config": strategy}
    fields = [f"engine.{field}={value}" for field, value in wanted.items() if getattr(recipe.engine, field) != value]
    fields += ["engine.shard_size=null"] * (recipe.engine.shard_size is not None)
    return " ".join([*fields, *["engine.cpu_offload=false"] * recipe.engine.cpu_offload])


def sweep(recipe: Recipe, fields: list[str]) -> list[list[str]]:
    """The overrides of each array task: every combination of the fields' values, and an output_dir of its own.

    ["train.seed=1,2", "adapter.k=1,20"] gives four tasks; the first is ["train.seed=1", "adapter.k=1",
    "output_dir=<recipe's>/train.seed=1,adapter.k=1"].
    """
    if not fields:
        return []
    choices: list[list[str]] = []
    swept: list[str] = []
    for field in fields:
        key, equals, values = field.partition("=")
        if not (key and equals) or "" in values.split(",") or field.split() != [field]:
            raise UserError(f"--sweep {field!r}: written key=value,value without spaces, such as train.seed=1,2,3")
        if key == "output_dir" or "/" in field:
            raise UserError(f"--sweep {field!r}: each task's folder is named after its values; sweep other fields")
        if len(set(values.split(","))) < len(values.split(",")) or key in swept:
            raise UserError(f"--sweep {field!r}: names a value or a field twice; two tasks would share a folder")
        swept.append(key)
        choices.append([f"{key}={value}" for value in values.split(",")])
    return [[*task, f"output_dir={recipe.output_dir}/{','.join(task)}"] for task in itertools.product(*choices)]
