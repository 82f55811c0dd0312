"""What a trained model does under corruption, what it attends to and how the branches of its heads respond to noise.

    python analysis.py runs/mnist-vitdiff-seed0

tests the best weights of a run again, prints the figures beside those on record, and writes the files of ANALYSES.
train.py does the same at the end of each run. The model is made from config.json and from the plugin beside the run.

    python analysis.py runs/mnist-vitdiff-seed0 --predict *.png
    model, prepare, classes = analysis.load_run("runs/mnist-vitdiff-seed0")

classify pictures. The command prints a line for each picture: its class, the probability and the second choice.
"""

import contextlib
import itertools
import json
import math
import sys
from collections import namedtuple
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

import align
import attack
import command
import corruptions
import data
import machine
import pictures
import plugins
import records
import stack
from command import UserError
from vit import MODELS, ViT, build_model, offers, owner_of


# What the class token attends to.

def attention_conditions(settings):
    """What images the attention is measured on: {name: (settings, corruption, severity)}."""
    if data.is_cluttered(settings["dataset"]):
        counts = sorted({0, 4, 8, 16, settings["distractors"]})
        return ({f"{count}_distractors": (settings | dict(distractors=count), None, 0) for count in counts}
                | {"gaussian_noise_3": (settings, "gaussian_noise", 3)})
    return ({"clean": (settings, None, 0)}
            | {f"{name}_3": (settings, name, 3) for name in ("gaussian_noise", "distractors")
               if name in corruptions.corruptions_of(settings["dataset"])})


def attention_batches(split, settings, shown, corruption, severity):
    """A split in its own order, by the settings `shown` of attention_conditions: normalised images (B, C, H, W), and
    which of their patches have any of the object, and anything at all before the corruption, (B, P)."""
    objects = data.evaluation_pixels(split, shown | dict(distractors=0))
    for (first, pixels), (_, alone) in zip(data.evaluation_pixels(split, shown), objects):
        relevant, ink = (data.has_ink(image, settings["patch_size"]) for image in (alone, pixels))
        corrupted = corruptions.corrupt(pixels, corruption, severity, first, split, shown)
        images = data.normalize(corrupted, settings["dataset"])
        yield from data.cache_sized(images, relevant, ink)


def attention_figures(row, relevant, ink):
    """What the class token attends to, of each image and head: {figure: (B, H)}.

    row: its signed weights (B, H, 1 + P), the first that of itself. relevant, ink: patches with any of the object, and
    with anything at all before a corruption, (B, P). Weight is absolute; shares of patches are of the weight on
    patches; entropy in nats.
    """
    weight = F.normalize(row.abs(), p=1, dim=2)
    on_patches = F.normalize(weight[:, :, 1:], p=1, dim=2)
    return dict(
        irrelevant_share=(on_patches * ~relevant[:, None]).sum(2),
        uniform_share=(~relevant).float().mean(1, keepdim=True).expand(row.shape[:2]),
        ink_share=(on_patches * ink[:, None]).sum(2),
        entropy=-torch.xlogy(weight, weight).sum(2),
        negative_share=(weight * (row < 0)).sum(2),
        **{"lambda": 1 - row.sum(2)})


def signal_to_noise(irrelevant_share, uniform_share):
    """Weight a relevant patch over weight an irrelevant patch; 1 for uniform weight."""
    relevant, irrelevant = (1 - irrelevant_share) * uniform_share, irrelevant_share * (1 - uniform_share)
    return relevant / irrelevant if irrelevant else math.inf if relevant else math.nan


def sum_attention(model, images, relevant, ink):
    """The sums of attention_figures over a batch: a tensor (figures, H) for each block."""
    maps = model.attention_maps(images)
    blocks = [attention_figures(attention_map[:, :, 0], relevant, ink) for attention_map in maps]
    return [torch.stack([figure.sum(0) for figure in figures.values()]) for figures in blocks]


@torch.no_grad()
def measure_attention(net, split, settings):
    """The rows of attention.csv of each model: means over a split, one row for each condition, block and head."""
    *names, ratio = records.ATTENTION_FIGURES
    tables = [[] for _ in net.models]
    for condition, shown in attention_conditions(settings).items():
        batches = [net.map(sum_attention, *batch) for batch in attention_batches(split, settings, *shown)]
        for block, sums in enumerate(zip(*batches)):
            for table, means in zip(tables, stack.total(sums) / len(split.labels)):  # (figures, H)
                for head, figures in enumerate(means.T.tolist()):
                    row = dict(condition=condition, block=block, head=head, **dict(zip(names, figures)))
                    row["lambda"] = round(row["lambda"], 6) + 0.0  # rounding errors of self-attention, and never -0
                    table.append(row | {ratio: signal_to_noise(row["irrelevant_share"], row["uniform_share"])})
    return tables


@torch.no_grad()
def picture_attention(net, split, settings):
    """The arrays of attention.npz of each model, of the first image of each of the first eight classes, or of fewer
    where the split has fewer: images (8, C, H, W) in bytes, labels (8,), and for each block map_0, map_1, ...
    (8, H, N, N) in float16."""
    places = [(split.labels == label).nonzero()[0].item() for label in split.labels.unique()[:8]]
    batches = itertools.islice(data.evaluation_pixels(split, settings), max(places) // data.EVALUATION_BATCH + 1)
    found = {place: pixels[place - first] for first, pixels in batches for place in places
             if first <= place < first + len(pixels)}
    pixels = torch.stack([found[place] for place in places])
    shown = dict(images=pixels.byte().cpu().numpy(), labels=split.labels[places].cpu().numpy())
    blocks = net.map(ViT.attention_maps, data.normalize(pixels, settings["dataset"]))  # (S, 8, H, N, N) each
    return [shown | {f"map_{block}": maps.half().cpu().numpy() for block, maps in enumerate(of_model)}
            for of_model in zip(*blocks)]


# What corruption does, to the answers and inside.

@torch.no_grad()
def measure_noise(net, split, settings):
    """The rows of noise.csv of each model: loss and accuracy on a split under each corruption. `amount` is that of
    corruptions.CORRUPTIONS: a table is read without the code that made it, and by which amounts is part of what it
    says."""
    sums = {}
    for key, images, labels in corruptions.corrupted_batches(split, settings):
        sums.setdefault(key, []).append(stack.evaluate_images(net, images, labels, settings))
    tables = [[] for _ in net.models]
    for name, severity in itertools.product(corruptions.corruptions_of(settings["dataset"]), range(1, 6)):
        amount = corruptions.amount_of(name, severity, split.images.shape[1])
        means = (stack.total(sums[name, severity]) / len(split.labels)).T.tolist()
        for table, (loss, accuracy) in zip(tables, means):
            table.append(dict(corruption=name, severity=severity, amount=amount, test_loss=loss,
                              test_accuracy=accuracy))
    return tables


def head_outputs(model, images):
    """What the heads add up, before any norm, at the tokens that the next layer reads: for each block a tensor
    (K, B, H, N, e) of the first branch, minus the second where there is one, and the sum of all."""
    outputs = [torch.stack([terms[0], *(-term for term in terms[1:2]), sum(terms)])
               for terms in model.attention_branches(images)]
    return [*outputs[:-1], outputs[-1][:, :, :, :1]]  # of the last block the head reads the class token alone


def sum_response(change):
    """Sums over a batch of what changed in head_outputs, (S, K, B, H, N, e): its energy (S, K, H), the cosine between
    the first branch and minus the second (S, 1, H), or (S, 0, H) where there is one alone, and itself (S, K, H, N, e).
    """
    cosines = F.cosine_similarity(change[:, :1], change[:, 1:-1], dim=-1)  # (S, 1, B, H, N)
    return [change.square().sum((2, 4, 5)), cosines.sum((2, 4)), change.sum(2)]


def response_figures(change, signal, count):
    """The figures of response.csv from the totals of sum_response over `count` images, as (S, figures, H).

    change: of what a corruption changes; signal: of the clean outputs around their mean over the images.

        noise_to_signal = |change|^2 / |signal|^2      common_share = count |mean change|^2 / |change|^2
    """
    (energy, cosine, sums), (signal_energy, signal_cosine, _) = change, signal
    common = sums.square().sum((3, 4)) / count
    images_and_tokens = count * sums.shape[3]
    return torch.cat([energy / signal_energy, common / energy, cosine / images_and_tokens,
                      signal_cosine / images_and_tokens], 1)


def response_rows(condition, block, figures):
    """Rows of response.csv, from figures (figures, H); what self-attention has not is empty, and so is 0 / 0."""
    has_two = len(figures) == len(records.RESPONSE_FIGURES)
    names = [name for name in records.RESPONSE_FIGURES if has_two or not name.endswith(("_2", "cosine"))]
    for head, values in enumerate(figures.T.tolist()):
        found = {name: value for name, value in zip(names, values, strict=True) if math.isfinite(value)}
        yield dict(condition=condition, block=block, head=head) | dict.fromkeys(records.RESPONSE_FIGURES, "") | found


@torch.no_grad()
def measure_response(net, split, settings):
    """The rows of response.csv of each model: how the branches of its heads respond to the noises, each with its shift
    and its fluctuation, at severity 3. One row for each condition, block and head."""
    count = len(split.labels)
    sums = [[outputs.sum(2, keepdim=True) for outputs in net.map(head_outputs, images)]
            for images, _ in data.evaluation_batches(split, settings)]
    means = [stack.total(block).float().to(split.labels.device) / count for block in zip(*sums)]  # (S, K, 1, H, N, e)
    names = list(filter(corruptions.is_noise, corruptions.CORRUPTIONS))
    totals, clean = {}, data.evaluation_batches(split, settings)

    def add(name, changes):
        for block, change in enumerate(changes):
            before = totals.get((name, block), itertools.repeat(0))
            totals[name, block] = [old + new.cpu().double() for old, new in zip(before, sum_response(change))]

    for (name, _), images, _ in corruptions.corrupted_batches(split, settings, names, [3]):
        if name == names[0]:  # of the next images
            before = net.map(head_outputs, next(clean)[0])
            add("clean", [block - mean for block, mean in zip(before, means)])
        add(name, [block - old for block, old in zip(net.map(head_outputs, images), before)])
    tables = [[] for _ in net.models]
    for name, block in itertools.product(names, range(len(means))):
        for table, figures in zip(tables, response_figures(totals[name, block], totals["clean", block], count)):
            table.extend(response_rows(f"{name}_3", block, figures))
    return tables


# The files that a run's analysis writes: {file: the function of a net, splits and the settings that returns for each
# model the rows of a CSV file or the arrays of an .npz file; what each attention must offer, if anything; which splits;
# whether a run writes the file by itself}.
Analysis = namedtuple("Analysis", "measure needs splits by_itself", defaults=[None, ["test"], True])
ANALYSES = {
    "noise.csv": Analysis(measure_noise),
    "attention.csv": Analysis(measure_attention, needs="attention_map"),
    "attention.npz": Analysis(picture_attention, needs="attention_map"),
    "response.csv": Analysis(measure_response, needs="branches"),
    "aligned.csv": Analysis(align.measure_aligned, "branches", ["test", "val"], by_itself=False),
    "attack.csv": Analysis(attack.measure_attack, by_itself=False),
}


def by_itself():
    """The files of ANALYSES that a run writes by itself."""
    return [name for name, row in ANALYSES.items() if row.by_itself]


@torch.no_grad()
def check_model(model, images, name, with_analysis=True):
    """Raise a UserError unless the attention of a model in eval mode is what it says, on a few images (B, C, H, W)."""
    for attn, x in model.attention_inputs(images):
        kind, found = f"{name}: {type(attn).__name__}", offers(attn)
        if "keep" in found and not torch.allclose(attn(x)[:, :1], attn(x, keep=1), rtol=1e-3, atol=1e-5):
            raise UserError(f"{kind}.forward(x, keep=1) is not the first token of forward(x): leave keep out where "
                            "what a token gets depends on the other rows of the map")
        if "mean_lambda" in found:
            value = (attn.mean_lambda(x) if "mean_lambda of tokens" in found else attn.mean_lambda()).item()
            if not records.is_finite(value):
                raise UserError(f"{kind}: mean_lambda is {value} before the first step: a record needs a finite number")
        if not with_analysis:
            continue
        if "attention_map" not in found:
            raise UserError(f"{kind} has no attention_map(x), which the analysis needs: write it, or train with "
                            "--no-analysis")
        for what, terms in [("attention_map", [attn.attention_map(x)]),
                            ("branches", attn.branches(x) if "branches" in found else [])]:
            for shape, is_finite in [(tuple(term.shape), term.isfinite().all()) for term in terms]:
                fits = len(shape) == 4 and shape[::2] == x.shape[:2] and (what == "branches" or shape[3] == shape[2])
                if not fits or not is_finite:
                    raise UserError(f"{kind}.{what}(x) is {shape}{'' if is_finite else ' with nan or inf'}, of tokens "
                                    f"{tuple(x.shape)}: mend it, or train with --no-analysis")


def is_described(attn, x):
    """Whether the branches of an attention add up to what its heads make, as far as can be seen: one of its modules is
    given their sum. Where the forward pass is not written below them, that is taken for granted."""
    return issubclass(owner_of(attn, "branches"), owner_of(attn, "forward")) or align.find_joint(attn, x) is not None


@torch.no_grad()
def choose_analyses(model, images, wanted=None):
    """Those of the wanted files of ANALYSES, or of by_itself(), that can be written of a model, by what its attention
    offers and does with a few images; a line says what is left out."""
    offered = set.intersection(*(offers(block.attn) for block in model.blocks))
    for attn, x in model.attention_inputs(images) if "branches" in offered else []:
        if not is_described(attn, x):
            command.say_once(f"{type(attn).__name__} changes forward(x), and what attention_map(x) and branches(x) say "
                             "is of another class: without these two of its own its attention is not analysed")
            offered -= {"attention_map", "branches"}
    return [name for name in wanted or by_itself() if ANALYSES[name].needs in (None, *offered)]


def analyse(folders, net, splits, settings, wanted=None):
    """Write the wanted files of ANALYSES of trained models, whose runs differ in their seed alone, or those of
    by_itself() that can be written; returns their names."""
    net.eval()
    names = choose_analyses(net.models[0], first_images(splits["test"], settings), wanted)
    for name in set(wanted or names) - set(names):
        raise UserError(f"{settings['model']}: {name} needs {ANALYSES[name].needs}(x) of its attention: write that, or "
                        "leave the analysis out")
    for name in tqdm(names, desc="analysis", unit=" files", leave=False, disable=None):
        row = ANALYSES[name]
        for folder, found in zip(folders, row.measure(net, *(splits[part] for part in row.splits), settings)):
            if name.endswith(".npz"):
                records.write_arrays(folder / name, found)
            else:
                records.write_csv(folder / name, found, amount="{:g}", epsilon="{:.6g}")
    return names


def first_images(split, settings):
    """The first two images of a split, normalised, (2, C, H, W)."""
    images, _ = next(data.evaluation_batches(split, settings))
    return images[:2]


# A trained model in use.

def load_run(folder):
    """The model of a run with its best weights, in eval mode on the CPU, what makes its input, and its classes' names.

        model, prepare, classes = load_run("runs/mnist-vitdiff-seed0")
        logits = model(prepare(PIL.Image.open("seven.png")))                    # (1, 10)

    prepare takes a PIL image or an array, uint8 (H, W), (H, W, C), (B, H, W) or (B, H, W, C), and returns normalised
    images (B, C, H, W), resized as those of training. The data need not be there.
    """
    folder = Path(folder)
    settings, facts = records.read_config(folder)
    plugins.execute_plugins(plugins.keep_plugins(folder.parent, settings.get("plugin")))
    command.check_name("model", settings["model"], MODELS)
    if "class_names" not in facts:  # of a record that is older than these facts
        command.check_name("data set", settings["dataset"], data.DATASETS)
        data.complete_row(settings["dataset"], Path("data"))
        facts |= data.facts_of(settings["dataset"])
    with records.reading(folder / "config.json", KeyError):
        known, names = settings | facts, ["image_size", "in_channels", "num_classes", *records.MODEL_SETTINGS]
        sizes, classes = {name: known[name] for name in names}, known["class_names"]
        mean, std = (torch.tensor(known[name]).view(-1, 1, 1) for name in ("mean", "std"))
    model = stack.load_weights(build_model(settings["model"], **sizes), folder)

    def prepare(images):
        side, channels = sizes["image_size"], sizes["in_channels"]
        pixels = torch.from_numpy(pictures.to_batch(images, side, "L" if channels == 1 else "RGB"))
        return (pixels.view(-1, side, side, channels).permute(0, 3, 1, 2) / 255 - mean) / std

    return model.eval(), prepare, classes


@torch.no_grad()
def predict(folder, files):
    """Print a line for each picture: the file, its class, the probability and the second choice."""
    model, prepare, classes = load_run(folder)
    for path in files:
        with pictures.opened(path) as picture:
            images = prepare(picture)
        (first, second), labels = model(images).softmax(1)[0].topk(2)
        best, next_best = (classes[label] for label in labels)
        print(f"{path}  {best}  {first:.1%}  (or {next_best}  {second:.1%})", flush=True)


# The command.

def analyse_stack(folders, device, args):
    """Test finished runs again that differ in their seed alone, print the figures beside those recorded, and write
    their analysis. --plugin: plugins in place of those that the runs were trained with, a fact of them from then on.
    --dataset: where data of one's own lie, if not where they were."""
    (settings, facts), *_ = configs = [records.read_config(folder) for folder in folders]
    summaries = [records.read_summary(folder) for folder in folders]
    executed = plugins.execute_plugins(args.plugin or plugins.keep_plugins(folders[0].parent, settings.get("plugin")))
    command.check_name("model", settings["model"], MODELS)
    with records.reading(folders[0] / "config.json"):
        records.check({*records.MODEL_SETTINGS, "label_smoothing"} <= settings.keys(), "a setting is missing")
    complete_row(folders[0], settings, facts, args)
    if len(folders) > 1 and stack.find_obstacle(settings):
        for folder in folders:
            analyse_stack([folder], device, args)
        return
    models = [stack.load_model(folder, own_settings).to(device) for folder, (own_settings, _) in zip(folders, configs)]
    net, splits = stack.StackedModel(models), data.load_splits(settings["dataset"], args.data_dir, device)
    check_model(models[0].eval(), first_images(splits["test"], settings), settings["model"])
    for folder, figures, summary in zip(folders, stack.evaluate(net, splits["test"], settings), summaries):
        recorded = summary["test_loss"], summary["test_accuracy"]
        for name, (loss, accuracy) in [("again", figures), ("recorded", recorded)]:
            print(f"{name:8}  test loss {loss:.6f}  test accuracy {accuracy:.2%}  {folder}", flush=True)
    wanted = [name for name in ANALYSES if Path(name).stem in args.analysis] if args.analysis else None
    try:
        names = analyse(folders, net, splits, settings, wanted)
    finally:  # what was written before an error belongs to the run
        for folder, (own_settings, own_facts), summary in zip(folders, configs, summaries):
            if args.plugin:
                records.write_json(folder / "config.json", dict(settings=own_settings,
                                                                facts=own_facts | dict(analysed_by=executed)))
            records.write_summary(folder, summary)
    for folder in folders:
        print(f"{', '.join(names) or 'nothing'} written into {folder}", flush=True)


def complete_row(folder, settings, facts, args):
    """Complete the row of DATASETS of a run. A UserError unless its data are those that the run was trained on."""
    if "data_path" in facts:
        data.add_path(args.dataset or facts["data_path"], settings.get("image_size"), settings["dataset"])
    command.check_name("data set", settings["dataset"], data.DATASETS)
    data.complete_row(settings["dataset"], args.data_dir)
    found = data.DATASETS[settings["dataset"]].get("identity", {}).get("data")
    if settings.get("data") not in (None, found):
        raise UserError(f"{folder} was trained on other data: they are {found} now, and were {settings['data']}: put "
                        "those back, or say by --dataset where they are")


def find_stacks(folders):
    """The folders of runs in lists of those that differ in their seed alone. A UserError if their plugins differ."""
    stacks, found = {}, [records.read_config(folder)[0] for folder in folders]
    if len({settings.get("plugin") for settings in found}) > 1:
        raise UserError("these runs were trained with different plugins: analyse those of one plugin at a time")
    for folder, settings in zip(folders, found):
        key = json.dumps([str(folder.parent), settings | dict(seed=None)], sort_keys=True)
        stacks.setdefault(key, []).append(folder)
    return list(stacks.values())


@machine.enough_memory()
def analyse_runs(args):
    if args.predict:
        if len(args.runs) > 1:
            raise UserError("argument --predict: name one run")
        return predict(args.runs[0], args.predict)
    stacks, device = find_stacks(args.runs), machine.pick_device(args.device)
    machine.take_threads(args.threads, device)
    for folders in stacks:
        with contextlib.ExitStack() as locks:
            for folder in folders:
                locks.enter_context(records.locked(folder))  # which gather would else move away meanwhile
            analyse_stack(folders, device, args)


def add_place_flags(parser):
    parser.add_argument("--device", default="auto", metavar="NAME",
                        help="cpu, cuda, cuda:1, mps or auto, which takes CUDA, else MPS, else the CPU (default: "
                        "%(default)s)")
    parser.add_argument("--threads", **command.whole_number(1), help="CPU threads (default: OMP_NUM_THREADS, or the "
                        "number of idle cores; a resumed run keeps its number)")
    parser.add_argument("--data-dir", type=command.usable_folder, default=Path("data"), metavar="DIR",
                        help="where the archives of the data sets are, or are downloaded to (default: %(default)s)")


def parse_flags(argv):
    names, own = (list(dict.fromkeys(Path(name).stem for name in files)) for files in (ANALYSES, by_itself()))
    parser = command.Parser("analysis.py", __doc__)
    parser.add_argument("runs", nargs="+", type=command.usable_folder, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--analysis", nargs="+", metavar="NAME", choices=names,
                        help=f"what to measure, of {', '.join(names)} (default: {', '.join(own)})")
    parser.add_argument("--plugin", **plugins.FLAG, nargs=1,
                        help="use this file instead of the plugin beside the runs, for example with a mended "
                             "attention_map; repeat the flag for several files")
    parser.add_argument("--predict", nargs="+", type=command.usable_path, metavar="FILE",
                        help="only classify these pictures")
    parser.add_argument("--dataset", metavar="PATH", help="where your own data lie now, if they were moved")
    add_place_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    """Returns the exit status: 0, 2 for what the user can put right, 130 when interrupted."""
    machine.keep_freed_memory()
    return command.exit_status("analysis.py", parse_flags, analyse_runs, argv)


if __name__ == "__main__":
    sys.exit(main())
