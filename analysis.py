"""What a trained model does under noise and what it attends to: noise.csv, attention.csv and attention.npz of a run.

    python analysis.py runs/mnist-vitdiff-seed0

tests the run's best weights again, prints the figures beside those recorded, and writes the analysis; train.py does so
at the end of each run. The model is made from config.json, and from the plugin that is kept beside the run.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import machine
import records
from diff_attention import SizeError
from records import UserError
from vit import MODELS, build_model


def make_model(settings):
    """The untrained model of a run, on the CPU, its weights drawn from the run's seed."""
    dataset = data.DATASETS[settings["dataset"]]
    torch.manual_seed(settings["seed"])
    return build_model(settings["model"], image_size=dataset["image_size"], in_channels=dataset["in_channels"],
                       num_classes=dataset["num_classes"], **{name: settings[name] for name in records.MODEL_SETTINGS})


def load_model(folder, settings, device):
    """The model of a run with its best weights, on the device."""
    model = make_model(settings).to(device)
    weights = records.read_checkpoint(folder / "best.pt")
    with records.reading(folder / "best.pt"):
        model.load_state_dict(weights)
    return model


def empty_images(settings, *batch):
    """Images (*batch, C, H, W) of the run's data set, of no content."""
    dataset = data.DATASETS[settings["dataset"]]
    return torch.empty(*batch, dataset["in_channels"], dataset["image_size"], dataset["image_size"])


def check_maps(model, name):
    """Raise a UserError unless the attention of the model can be analysed."""
    for block in model.blocks:
        if not hasattr(block.attn, "attention_map"):
            raise UserError(f"{name}: {type(block.attn).__name__} has no attention_map(x), which the analysis needs: "
                            "write it, or train with --no-analysis")


def measure_model(settings, with_maps=False):
    """The model's parameters and the FLOPs of its forward pass for an image, without memory or arithmetic.

    Raises:
        UserError: if the sizes do not fit together, or `with_maps` and an attention has no attention_map.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        try:
            model = make_model(settings)
        except SizeError as error:
            raise UserError(f"{settings['model']} on {settings['dataset']}: {error}") from None
        model(empty_images(settings, 1))
    if with_maps:
        check_maps(model, settings["model"])
    return dict(parameters=sum(parameter.numel() for parameter in model.parameters()),
                flops_per_image=counter.get_total_flops())


@torch.inference_mode()
def check_lambdas(settings, device):
    """Raise a UserError unless the untrained model's mean lambdas are numbers that its record can hold."""
    model = make_model(settings).to(device).eval()
    for value in model.mean_lambdas(empty_images(settings, 2).zero_().to(device)):
        if not records.is_finite(value.item()):
            raise UserError(f"{settings['model']}: mean_lambda is {value.item()} before the first step: a record needs "
                            "a finite number")


# Loss, accuracy and lambda.

def evaluate_batch(model, images, labels, settings):
    """The sum of the losses of a batch, and the number of correct answers: images (B, C, H, W), labels (B,)."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=settings["label_smoothing"], reduction="sum")
    return loss, (logits.argmax(1) == labels).sum()


@torch.inference_mode()
def evaluate(model, split, settings, *corrupted):
    """Mean loss and accuracy over all images of a split, in float32; corrupted: as for data.evaluation_batches."""
    model.eval()
    batches = data.evaluation_batches(split, settings, *corrupted)
    sums = [evaluate_batch(model, images, labels, settings) for images, labels in batches]
    return [sum(torch.stack(column).tolist()) / len(split.labels) for column in zip(*sums)]


@torch.inference_mode()
def measure_lambdas(model, split, settings):
    """The mean weight of the second map over the images of a split: a float for each differential block."""
    model.eval()
    batches = [model.mean_lambdas(images) for images, _ in data.evaluation_batches(split, settings)]
    return [torch.stack(block).mean().item() for block in zip(*batches)]


# What the class token attends to, and what noise does.

def attention_conditions(settings):
    """What images the attention is measured on: {name: (settings, corruption, severity)}."""
    if data.is_cluttered(settings["dataset"]):
        counts = sorted({0, 4, 8, 16, settings["distractors"]})
        return ({f"{count}_distractors": (settings | dict(distractors=count), None, 0) for count in counts}
                | {"gaussian_noise_3": (settings, "gaussian_noise", 3)})
    return ({"clean": (settings, None, 0)}
            | {f"{name}_3": (settings, name, 3) for name in ("gaussian_noise", "distractors")})


def attention_batches(split, settings, shown, corruption, severity):
    """A split in its own order, by the settings `shown` of attention_conditions: normalised images (B, C, H, W), and
    which of their patches have any of the object, and anything at all, (B, P)."""
    for (first, pixels), alone in zip(data.evaluation_pixels(split, shown), data.object_pixels(split, shown)):
        relevant, ink = (data.has_ink(image, settings["patch_size"]) for image in (alone, pixels))
        images = data.normalize(data.corrupt(pixels, corruption, severity, first, split), settings["dataset"])
        yield from data.cache_sized(images, relevant, ink)


def attention_figures(row, relevant, ink):
    """What the class token attends to, of each image and head: {figure: (B, H)}.

    row: its signed weights (B, H, 1 + P), the first that of itself. relevant, ink: patches with any of the object, and
    with anything at all, (B, P). Weight is absolute; shares of patches are of the weight on patches; entropy in nats.
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


@torch.inference_mode()
def measure_attention(model, split, settings):
    """The rows of attention.csv: means over a split, one row for each condition, block and head."""
    model.eval()
    *names, ratio = records.ATTENTION_FIGURES
    rows = []
    for condition, shown in attention_conditions(settings).items():
        batches = [sum_attention(model, *batch) for batch in attention_batches(split, settings, *shown)]
        for block, sums in enumerate(zip(*batches)):
            total = torch.stack(sums).cpu().double().sum(0)
            for head, means in enumerate((total / len(split.labels)).T.tolist()):
                row = dict(condition=condition, block=block, head=head, **dict(zip(names, means)))
                row["lambda"] = round(row["lambda"], 6) + 0.0  # rounding errors of self-attention, and never -0
                rows.append(row | {ratio: signal_to_noise(row["irrelevant_share"], row["uniform_share"])})
    return rows


@torch.inference_mode()
def picture_attention(model, split, settings):
    """The arrays of attention.npz, of the first image of each of the first eight classes, or of fewer where the split
    has fewer: images (8, C, H, W) in bytes, labels (8,), and for each block map_0, map_1, ... (8, H, N, N) in float16.
    """
    model.eval()
    places = [(split.labels == label).nonzero()[0].item() for label in split.labels.unique()[:8]]
    batches = itertools.islice(data.evaluation_pixels(split, settings), max(places) // data.EVALUATION_BATCH + 1)
    found = {place: pixels[place - first] for first, pixels in batches for place in places
             if first <= place < first + len(pixels)}
    pixels = torch.stack([found[place] for place in places])
    maps = model.attention_maps(data.normalize(pixels, settings["dataset"]))
    return dict(images=pixels.byte().cpu().numpy(), labels=split.labels[places].cpu().numpy(),
                **{f"map_{block}": attention_map.half().cpu().numpy() for block, attention_map in enumerate(maps)})


def measure_noise(model, split, settings):
    """The rows of noise.csv: each corruption of whole images, and Gaussian noise on a part of their patches."""
    corruptions = {name: (name, None) for name in data.CORRUPTIONS}
    corruptions |= {name: ("gaussian_noise", part) for part, name in records.PARTIAL_NOISE.items()}
    rows = []
    for (name, (corruption, part)), severity in itertools.product(corruptions.items(), range(1, 6)):
        loss, accuracy = evaluate(model, split, settings, corruption, severity, part)
        rows.append(dict(corruption=name, severity=severity, test_loss=loss, test_accuracy=accuracy))
    return rows


def analyse(folder, model, split, settings):
    """Write noise.csv, what corruption does to a trained model, and attention.csv and .npz, what it attends to."""
    records.write_csv(folder / "noise.csv", measure_noise(model, split, settings))
    records.write_csv(folder / "attention.csv", measure_attention(model, split, settings))
    records.write_arrays(folder / "attention.npz", picture_attention(model, split, settings))


# The command.

def analyse_run(folder, device, data_dir):
    """Test a finished run again, print the figures beside those recorded, and write its analysis."""
    settings, _ = records.read_config(folder)
    summary = records.read_summary(folder)
    if "crc32" in summary:
        records.check_files(folder, summary["crc32"], ["config.json"])
    if settings.get("plugin"):
        records.execute_plugin(records.find_run_plugin(folder, settings["plugin"]))
    with records.reading(folder / "config.json"):
        records.check(set(records.SETTINGS) <= set(settings), "a setting is missing")
    records.check_name("model", settings["model"], MODELS)
    records.check_name("data set", settings["dataset"], data.DATASETS)
    data.complete_row(settings["dataset"], data_dir)
    model = load_model(folder, settings, device)
    check_maps(model, settings["model"])
    split = data.load_splits(settings["dataset"], data_dir, device)["test"]
    figures = evaluate(model, split, settings)
    for name, (loss, accuracy) in [("again", figures), ("recorded", (summary["test_loss"], summary["test_accuracy"]))]:
        print(f"{name:8}  test loss {loss:.6f}  test accuracy {accuracy:.2%}  {folder}", flush=True)
    with records.locked(folder):
        analyse(folder, model, split, settings)
        records.write_summary(folder, summary)
    print(f"{', '.join(records.ANALYSIS)} written into {folder}", flush=True)


@machine.enough_memory()
def analyse_runs(args):
    if len({records.read_config(folder)[0].get("plugin") for folder in args.runs}) > 1:
        raise UserError("these runs were trained with different plugins: analyse those of one plugin at a time")
    device = machine.pick_device(args.device)
    machine.take_threads(args.threads, device)
    for folder in args.runs:
        analyse_run(folder, device, args.data_dir)


def add_place_flags(parser):
    parser.add_argument("--device", default="auto", metavar="NAME",
                        help="cpu, cuda, cuda:1, mps or auto: CUDA, then MPS, then CPU (default: %(default)s)")
    parser.add_argument("--threads", **records.whole_number(1), help="of the CPU (default: OMP_NUM_THREADS, or as many "
                        "as other processes leave cores idle; of a run that is resumed as many as it was begun with)")
    parser.add_argument("--data-dir", type=records.usable_folder, default=Path("data"), metavar="DIR",
                        help="default: %(default)s")


def parse_flags(argv):
    parser = records.Parser(prog="analysis.py", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=records.usable_folder, metavar="RUN", help="folder of a finished run")
    add_place_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    """Returns the exit status: 0, 2 for what the user can put right, 130 when interrupted."""
    return records.exit_status("analysis.py", parse_flags, analyse_runs, argv)


if __name__ == "__main__":
    sys.exit(main())
