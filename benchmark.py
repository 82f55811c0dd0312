"""What a training step costs, and how that grows with the size of the model, the image and the batch.

    python benchmark.py --model vit vitdiff --seed 0 1 2 3 4
    python benchmark.py --model vit vitdiff --growth

takes the flags of train.py and times some training steps. It writes benchmark.csv or growth.csv, and a table of it in
Markdown, into --runs-dir. Models that are compared take turns, because other processes slow all of them down at times.
"""

import functools
import itertools
import math
import statistics
import sys
import time

import torch
from tqdm import tqdm

import command
import data
import machine
import plugins
import records
import stack
import train
from command import UserError

GROWTH = dict(dim=[32, 64, 128, 256], depth=[2, 4, 8], patch_size=[7, 6, 4, 2], batch_size=[32, 128, 512, 2048])
MOST_TOKENS = 257  # of an image while another size grows
ROUNDS, CALLS = 10, 16
NOTES = dict(
    benchmark="A step is a whole training step: batch, augmentation, forward, backward, clipping, optimizer; times are "
              "medians of turns. MFLOPs are those of the forward and backward pass; peak is that of a product of large "
              "square matrices in the same run, on CUDA in its precision; warm-up is what comes before, with "
              "compilation and capture.",
    growth="Times are medians of whole training steps of one seed, not compiled, in turns. The exponent is the slope "
           "of a line through the logarithms: 1 if the time grows as the size does. With dim, MLP and head grow alike.")


def make_step(settings, seeds, split, device, compiled):
    """A function of nothing that takes one whole training step of a stack, as train.py does: batch, augmentation,
    forward, backward, clipping, optimizer."""
    if settings["batch_size"] > len(split.labels):
        raise UserError(f"a batch of {settings['batch_size']} is more than the {len(split.labels)} training images of "
                        f"{settings['dataset']}: give a smaller --batch-size")
    stacked = train.make_stack(settings, seeds, "", device, compiled, required=True)
    epochs = (stack.rank_batches(split, seeds, epoch, settings) for epoch in itertools.count(1))
    batches = (batch for epoch in epochs for batch in epoch if batch[1].shape[1] == settings["batch_size"])

    def step():
        stack.set_lr(stacked.optimizer, 0.1)  # of the peak, at which nothing diverges
        return stacked.step(*next(batches))

    return step


def measure_seconds(function, device, calls=1):
    """How long calls of a function take, what they started on the device included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.mps.synchronize if device.type == "mps" else int
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    wait()
    return time.perf_counter() - start


def time_in_turn(functions, device, rounds, calls):
    """Seconds a call of each function, a mean over each of its turns: some steps cut the batches of others, too. The
    call before those of a turn is not counted, as it finds the caches full of another's data."""
    times = [[] for _ in functions]
    for _ in tqdm(range(rounds), desc="timing", unit=" rounds", leave=False, disable=None):
        for seconds, function in zip(times, functions):
            function()
            seconds.append(measure_seconds(function, device, calls) / calls)
    return times


def benchmark_steps(experiments, splits, device, with_compiled):
    """Rows of benchmark.csv, with the threads that torch now takes: each experiment by one seed and, where several are
    given, by as many side by side as train.py would train; plain and, if so wanted, compiled."""
    rows, steps, evaluations = [], [], []
    for settings, facts, all_seeds, size in experiments:
        model = stack.StackedModel([stack.make_model(settings).to(device)])
        evaluation = functools.partial(stack.evaluate, model, splits[settings["dataset"]]["val"], settings)
        for seeds, compiled in itertools.product(dict.fromkeys([(all_seeds[0],), tuple(all_seeds[:size])]),
                                                 [False, True] if with_compiled else [False]):
            start = time.perf_counter()
            step = make_step(settings, list(seeds), splits[settings["dataset"]]["train"], device, compiled)
            for _ in range(4):  # at the fourth a step is captured
                measure_seconds(step, device)
            rows.append(dict(
                dataset=settings["dataset"], model=settings["model"], threads=torch.get_num_threads(),
                seeds=len(seeds), compiled=compiled,
                batch_size=settings["batch_size"], parameters=facts["parameters"],
                training_flops_per_image=stack.measure_model(settings, backward=True).get("flops_per_image", math.nan),
                warm_up_seconds=time.perf_counter() - start))
            steps.append(step)
            evaluations.append(evaluation)
    # The peak is that of a large product: on CUDA in the precision of the run; a CPU may take a minute for one in half.
    side, dtype = (8192, machine.precision(experiments[0].settings["amp"], device)["dtype"]) if (
        device.type == "cuda") else (2048, None)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    *trainings, products = time_in_turn([*steps, lambda: matrix @ matrix], device, ROUNDS, CALLS)
    peak, one_seed = 2 * side**3 / statistics.median(products), {}
    for row, training, evaluation in zip(rows, trainings, time_in_turn(evaluations, device, rounds=3, calls=3)):
        low, *_, high = (1e3 * seconds for seconds in statistics.quantiles(training, n=10))
        milliseconds, seeds = 1e3 * statistics.median(training), row["seeds"]
        alone = one_seed.setdefault((row["dataset"], row["model"]), milliseconds)  # of one seed, plain
        images_per_second = 1e3 * seeds * row["batch_size"] / milliseconds
        row.update(
            ms_per_step=milliseconds, ms_low=low, ms_high=high, ms_per_seed=milliseconds / seeds,
            relative_to_one_seed=milliseconds / seeds / alone, images_per_second=images_per_second,
            epoch_seconds=seeds * data.training_size(row["dataset"]) / images_per_second,
            evaluation_images_per_second=data.validation_size(row["dataset"]) / statistics.median(evaluation),
            peak_gflops=peak / 1e9, share_of_peak=images_per_second * row["training_flops_per_image"] / peak)
    return rows


STEPS = {  # headings and cells of benchmark.md, by a row of benchmark.csv
    "model, data set": "{model}, {dataset}", "threads": "{threads}", "seeds": "{seeds}", "compiled": "{compiled}",
    "ms a step (10% to 90%)": "{ms_per_step:.1f} ({ms_low:.1f} to {ms_high:.1f})", "ms a seed": "{ms_per_seed:.2f}",
    "relative to one seed, plain": "{relative_to_one_seed:.2f}", "images/s": "{images_per_second:,.0f}",
    "s an epoch": "{epoch_seconds:.1f}", "MFLOPs an image": "{mflops:.2f}", "share of peak": "{share_of_peak:.1%}",
    "images/s evaluated": "{evaluation_images_per_second:,.0f}", "warm-up, s": "{warm_up_seconds:.1f}"}


def steps_table(rows):
    rows = [row | dict(compiled="yes" if row["compiled"] else "no", mflops=row["training_flops_per_image"] / 1e6)
            for row in rows]
    return markdown(STEPS, [[cell.format(**row) for cell in STEPS.values()] for row in rows])


def benchmark_growth(experiments, splits, device):
    """Rows of growth.csv: plain steps of one seed while one size grows; MLP and head stay four times as wide as the
    tokens."""
    rows, steps = [], []
    for (settings, _, seeds, _), (size, values) in itertools.product(experiments, GROWTH.items()):
        for value in values:
            grown = settings | {size: value}
            if size == "dim":
                grown |= dict(mlp_dim=4 * value, head_hidden_dim=4 * value)
            split, tokens = splits[settings["dataset"]]["train"], stack.count_tokens(grown)
            side = data.DATASETS[settings["dataset"]]["image_size"]
            if side % grown["patch_size"] or tokens > MOST_TOKENS or grown["batch_size"] > len(split.labels):
                continue
            stack.measure_model(grown)  # which says what does not fit together
            step = make_step(grown, seeds[:1], split, device, compiled=False)
            step()
            row = dict(dataset=settings["dataset"], model=settings["model"],
                       size="tokens" if size == "patch_size" else size, value=tokens if size == "patch_size" else value,
                       threads=torch.get_num_threads())
            if device.type == "cuda":
                row["peak_megabytes"] = peak_memory(step, device) / 2**20
            rows.append(row)
            steps.append(step)
    if not rows:
        raise UserError(f"no image has {MOST_TOKENS} tokens or fewer: give a larger --patch-size")
    for row, times in zip(rows, time_in_turn(steps, device, rounds=4, calls=8)):
        row["ms_per_step"] = 1e3 * statistics.median(times)
    return rows


def peak_memory(step, device):
    """The most bytes that the CUDA allocator gives out during a step, above what it had given out before."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def growth_table(rows):
    """A line for each size that was timed at two values or more, data set and model; the exponent is the slope of a
    line through the logarithms."""
    figures = {name: heading for name, heading in [("ms_per_step", "ms a step"), ("peak_megabytes", "peak MB")]
               if name in rows[0]}
    groups, lines = {}, []
    for row in rows:
        groups.setdefault((row["size"], f"{row['model']}, {row['dataset']}"), []).append(row)
    sizes = [size for size, _ in groups]
    for names, group in sorted(groups.items(), key=lambda item: (sizes.index(item[0][0]), item[1][0]["dataset"])):
        values = [row["value"] for row in group]
        if len(values) > 1:
            lines.append([*names, ", ".join(map(str, values))])
            for figure in figures:
                logarithms = [list(map(math.log, numbers)) for numbers in (values, [row[figure] for row in group])]
                lines[-1] += [", ".join(f"{row[figure]:.1f}" for row in group),
                              f"{statistics.linear_regression(*logarithms).slope:.2f}"]
    return markdown(["what grows", "model, data set", "from, to",
                     *(cell for heading in figures.values() for cell in (heading, "exponent"))], lines)


def markdown(header, rows):
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, ["---", *["---:"] * (len(header) - 1)], *rows])


@machine.enough_memory()
def run_benchmark(args):
    if machine.started_by_torchrun():
        raise UserError("benchmark.py takes one process: leave out torchrun")
    args.analysis = False  # so that an attention need not have what the analysis needs
    plugin = plugins.execute_plugins(args.plugin)
    train.check_flags(args)
    device = machine.pick_device(args.device)
    experiments = train.plan_experiments(args, device, plugin)
    splits = {name: data.load_splits(name, args.data_dir, device)
              for name in dict.fromkeys(experiment.settings["dataset"] for experiment in experiments)}
    machine.take_threads(args.threads, device)
    torch._dynamo.config.recompile_limit = 20 * len(experiments)  # so that all can stay compiled side by side
    with records.locked(args.runs_dir):  # from the start, so that no figures are lost at the end
        table = measure(args, experiments, splits, device)
    print(table, end="")


def measure(args, experiments, splits, device):
    """Write what is asked for as a CSV file and as a table in Markdown, which is returned."""
    if args.growth:
        name, rows = "growth", benchmark_growth(experiments, splits, device)
        table = growth_table(rows)
    else:
        amp = experiments[0].settings["amp"]
        with_compiled = stack.is_compiled(args.compile, stack.COMPILED_STEPS, device, amp)
        name, rows, threads = "benchmark", [], torch.get_num_threads()  # as many as a training takes
        for count in dict.fromkeys([1, threads]) if device.type == "cpu" else [threads]:
            torch.set_num_threads(count)
            rows += benchmark_steps(experiments, splits, device, with_compiled)
        table = steps_table(rows)
    here = dict(device_name=machine.name_device(device), torch=torch.__version__)
    threads = " and ".join(dict.fromkeys(str(row["threads"]) for row in rows))
    table += (f"\n{NOTES[name]} Measured on {here['device_name']} by torch {here['torch']}; threads on the CPU: "
              f"{threads}.\n")
    records.write_csv(args.runs_dir / f"{name}.csv", [row | here for row in rows], number="{:.6g}")
    records.write_whole(args.runs_dir / f"{name}.md", table)
    return table


def parse_flags(argv):
    parser = train.make_parser("benchmark.py", __doc__)
    parser.add_argument("--growth", action="store_true", help="time growing sizes instead of seeds and compilation")
    return parser.parse_args(argv)


def main(argv=None):
    """Returns the exit status: 0, 2 for what the user can put right, 130 when interrupted."""
    machine.keep_freed_memory()
    return command.exit_status("benchmark.py", parse_flags, run_benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
