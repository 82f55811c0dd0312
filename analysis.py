"""What a trained model does under corruption, what it attends to and how the branches of its heads respond to noise:
noise.csv, attention.csv, attention.npz and response.csv of a run.

    python analysis.py runs/mnist-vitdiff-seed0

tests the run's best weights again, prints the figures beside those recorded, and writes the analysis; train.py does so
at the end of each run. The model is made from config.json, and from the plugin that is kept beside the run.
"""

import argparse
import contextlib
import itertools
import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import machine
import records
from diff_attention import SizeError
from records import UserError
from vit import MODELS, build_model, offers_branches


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


def count_tokens(settings):
    """Tokens of an image, the class token among them."""
    return (data.DATASETS[settings["dataset"]]["image_size"] // settings["patch_size"]) ** 2 + 1


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


# The models of a stack of seeds, each on the same images.

class Call(nn.Module):
    """A function of a model and tensors as a module of tensors, so that it can be called with other weights."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *tensors):
        return self.function(self.model, *tensors)


def is_mapped(models):
    """Whether models are mapped over a batch rather than called one after the other: where to start an operation takes
    longer than to compute it. On a CPU, batches fill the caches, and mapped models take a third longer."""
    return len(models) > 1 and any(parameter.is_cuda for parameter in models[0].parameters())


def map_models(models, function):
    """The function of tensors that does what function(model, *tensors), which returns a list of tensors, does for each
    of S models of one architecture, without dropout: it returns a list of tensors (S, ...)."""
    calls = [Call(model, function).eval() for model in models]

    def call_each(*tensors):
        return [torch.stack(results) for results in zip(*(call(*tensors) for call in calls))]

    def call_all(*tensors):
        with contextlib.suppress(RuntimeError):
            return torch.vmap(functional_call, in_dims=(None, 0, None))(calls[0], weights, tensors)
        return call_each(*tensors)  # where there is no memory for all at once, or an attention cannot be mapped

    if not is_mapped(models):
        return call_each
    weights = stack_module_state(calls)
    return call_all


def total(batches):
    """The sum of tensors over the batches, as a CPU tensor in float64: one copy from the device."""
    return torch.stack(batches).cpu().double().sum(0)


# Loss, accuracy and lambda.

def evaluate_batch(model, images, labels, settings):
    """The sum of the losses of a batch, and the number of correct answers: images (B, C, H, W), labels (B,)."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=settings["label_smoothing"], reduction="sum")
    return [loss, (logits.argmax(1) == labels).type_as(loss).sum()]


def batch_evaluation(models, settings):
    """The function of a batch, images (B, C, H, W) and labels (B,), that returns sums of loss and of correct answers
    (2, S)."""
    evaluate_models = map_models(models, lambda *batch: evaluate_batch(*batch, settings))
    return lambda images, labels: torch.stack(evaluate_models(images, labels))


@torch.no_grad()
def evaluate(models, split, settings):
    """Loss and accuracy of each model, means over all images of a split, in float32: a list of pairs."""
    evaluate_models = batch_evaluation(models, settings)
    sums = [evaluate_models(*batch) for batch in data.evaluation_batches(split, settings)]
    return (total(sums) / len(split.labels)).T.tolist()


@torch.no_grad()
def measure_lambdas(models, split, settings):
    """The mean weight of the second map over the images of a split: of each model a float for each differential block.
    """
    mean_lambdas = map_models(models, type(models[0]).mean_lambdas)
    batches = [[len(labels) * block for block in mean_lambdas(images)]
               for images, labels in data.evaluation_batches(split, settings)]
    blocks = [total(block) / len(split.labels) for block in zip(*batches)]
    return [[block[i].item() for block in blocks] for i in range(len(models))]


# What the class token attends to.

def attention_conditions(settings):
    """What images the attention is measured on: {name: (settings, corruption, severity)}."""
    if data.is_cluttered(settings["dataset"]):
        counts = sorted({0, 4, 8, 16, settings["distractors"]})
        return ({f"{count}_distractors": (settings | dict(distractors=count), None, 0) for count in counts}
                | {"gaussian_noise_3": (settings, "gaussian_noise", 3)})
    return ({"clean": (settings, None, 0)}
            | {f"{name}_3": (settings, name, 3) for name in ("gaussian_noise", "distractors")
               if name in data.corruptions_of(settings["dataset"])})


def attention_batches(split, settings, shown, corruption, severity):
    """A split in its own order, by the settings `shown` of attention_conditions: normalised images (B, C, H, W), and
    which of their patches have any of the object, and anything at all before the corruption, (B, P)."""
    for (first, pixels), alone in zip(data.evaluation_pixels(split, shown), data.object_pixels(split, shown)):
        relevant, ink = (data.has_ink(image, settings["patch_size"]) for image in (alone, pixels))
        corrupted = data.corrupt(pixels, corruption, severity, first, split, shown)
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
def measure_attention(models, split, settings):
    """The rows of attention.csv of each model: means over a split, one row for each condition, block and head."""
    *names, ratio = records.ATTENTION_FIGURES
    sum_models = map_models(models, sum_attention)
    tables = [[] for _ in models]
    for condition, shown in attention_conditions(settings).items():
        batches = [sum_models(*batch) for batch in attention_batches(split, settings, *shown)]
        for block, sums in enumerate(zip(*batches)):
            for table, means in zip(tables, total(sums) / len(split.labels)):  # (figures, H)
                for head, figures in enumerate(means.T.tolist()):
                    row = dict(condition=condition, block=block, head=head, **dict(zip(names, figures)))
                    row["lambda"] = round(row["lambda"], 6) + 0.0  # rounding errors of self-attention, and never -0
                    table.append(row | {ratio: signal_to_noise(row["irrelevant_share"], row["uniform_share"])})
    return tables


@torch.no_grad()
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


# What corruption does, to the answers and inside.

@torch.no_grad()
def measure_noise(models, split, settings):
    """The rows of noise.csv of each model: loss and accuracy on a split under each corruption. `amount` is the one of
    data.CORRUPTIONS: a table is read without the code that made it, and by which amounts is part of what it says."""
    evaluate_models, sums = batch_evaluation(models, settings), {}
    for key, images, labels in data.corrupted_batches(split, settings):
        sums.setdefault(key, []).append(evaluate_models(images, labels))
    tables = [[] for _ in models]
    for name, severity in itertools.product(data.corruptions_of(settings["dataset"]), range(1, 6)):
        amount = data.get_amount(name, severity, split.images.shape[1])
        means = (total(sums[name, severity]) / len(split.labels)).T.tolist()
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
def measure_response(models, split, settings):
    """The rows of response.csv of each model: how the branches of its heads respond to the noises, each with its shift
    and its fluctuation, at severity 3. One row for each condition, block and head."""
    outputs_of, count = map_models(models, head_outputs), len(split.labels)
    sums = [[outputs.sum(2, keepdim=True) for outputs in outputs_of(images)]
            for images, _ in data.evaluation_batches(split, settings)]
    means = [total(block).float().to(split.labels.device) / count for block in zip(*sums)]  # (S, K, 1, H, N, e)
    noises = [name for name in data.CORRUPTIONS if data.corruption_kind(name) in data.NOISES]
    totals, clean = {}, data.evaluation_batches(split, settings)

    def add(name, changes):
        for block, change in enumerate(changes):
            before = totals.get((name, block), itertools.repeat(0))
            totals[name, block] = [old + new.cpu().double() for old, new in zip(before, sum_response(change))]

    for (name, _), images, _ in data.corrupted_batches(split, settings, noises, [3]):
        if name == noises[0]:  # of the next images
            before = outputs_of(next(clean)[0])
            add("clean", [block - mean for block, mean in zip(before, means)])
        add(name, [block - old for block, old in zip(outputs_of(images), before)])
    tables = [[] for _ in models]
    for name in noises:
        for block in range(len(means)):
            for table, figures in zip(tables, response_figures(totals[name, block], totals["clean", block], count)):
                table.extend(response_rows(f"{name}_3", block, figures))
    return tables


def analyse(folders, models, split, settings):
    """Write what trained models do under corruption, what they attend to and how their branches respond: noise.csv,
    attention.csv and .npz, response.csv. The models are of runs that differ in their seed alone. Returns the names of
    the files."""
    tables = {"noise.csv": measure_noise(models, split, settings),
              "attention.csv": measure_attention(models, split, settings)}
    if all(map(offers_branches, [block.attn for block in models[0].blocks])):
        tables["response.csv"] = measure_response(models, split, settings)
    for i, (folder, model) in enumerate(zip(folders, models)):
        for name, rows in tables.items():
            records.write_csv(folder / name, rows[i], amount="{:g}")
        records.write_arrays(folder / "attention.npz", picture_attention(model, split, settings))
    return [*tables, "attention.npz"]


# The command.

def analyse_run(folder, device, data_dir):
    """Test a finished run again, print the figures beside those recorded, and write its analysis."""
    records.read_config(folder)  # so that no folder is made where there is no run
    with records.locked(folder):  # which gather would else move away meanwhile
        repeat_test(folder, device, data_dir)


def repeat_test(folder, device, data_dir):
    settings, _ = records.read_config(folder)
    summary = records.read_summary(folder)
    if "crc32" in summary:
        records.check_files(folder, summary["crc32"], ["config.json", "metrics.csv"])
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
    (figures,) = evaluate([model], split, settings)
    for name, (loss, accuracy) in [("again", figures), ("recorded", (summary["test_loss"], summary["test_accuracy"]))]:
        print(f"{name:8}  test loss {loss:.6f}  test accuracy {accuracy:.2%}  {folder}", flush=True)
    names = analyse([folder], [model], split, settings)
    records.write_summary(folder, summary)
    print(f"{', '.join(names)} written into {folder}", flush=True)


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
    machine.keep_freed_memory()
    return records.exit_status("analysis.py", parse_flags, analyse_runs, argv)


if __name__ == "__main__":
    sys.exit(main())
