"""OV-SAM's claims over several seeds: all variants of a seed learn from the same SAM.

each seed: SAM -> its embeddings, once -> OV-SAM from each teacher -> IoU, accuracy, cost beside SAM and the baselines
                                          OV-SAM of the first teacher -> accuracy among more names and with other
                                                                         weights of CLIP; mask AP of detectors' boxes
-> claims with 95 % intervals -> <storage>/reports/ovsam_study.json, .md

OV-SAM is compared with the baselines that have the highest novel accuracy. Other teachers get the number of steps that
takes the same number of operations. More names and other weights of CLIP are tried on images outside the main table.

python -m workflows.studies.ovsam --config pictograms --teacher store/runs/clip/NAME/model
python -m workflows.studies.ovsam --config pictograms --teacher ... \
    --other-teachers store/runs/clip/NAME_OF_A_VIT/model --detectors store/runs/codet/NAME/model
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "storage teacher other_teachers vocabulary_sizes detectors")

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from data_prep import storage, tables
from data_prep.embeddings.texts import StoredEncoder, TextStore
from ovd_models.checkpoints import load_model, read_info
from ovd_models.ovsam.head import fuse_scores
from ovd_models.ovsam.model import OvSam
from ovd_models.ovsam.training import Clip2SamTraining, FeatureBatch, Sam2ClipTraining
from ovd_models.sam.model import SamModel
from ovd_models.segments import MaskBatch
from ovd_models.vocabulary import build_vocabulary
from workflows import ovsam, prepare_boxes
from workflows.common import cli, training
from workflows.configs import boxes as boxes_configs
from workflows.configs import ovsam as ovsam_configs
from workflows.inputs import ovsam as ovsam_inputs
from workflows.reports import pointing as pointing_report
from workflows.reports.pointing import BASELINES, PROMPT_KINDS
from workflows.studies import ovsam_boxes
from workflows.studies import study as studies
from workflows.studies.ovsam_names import competing_names
from workflows.studies.study import Claim, Measurement, Metrics, Results, Study, StudyRun

IMAGE_CROPS = tuple(name for name, config in BASELINES.items() if config.crop == "image")
FEATURES = tuple(name for name, config in BASELINES.items() if config.crop != "image")
PAPER = {
    ("box", "image crop"): 0.381,
    ("box", "CLIP features"): 0.292,
    ("point", "image crop"): 0.522,
    ("point", "CLIP features"): 0.446,
}
"""OV-SAM's accuracy minus the baseline's, by prompt and kind of baseline."""
BY_IMAGE = ("iou_all", "accuracy_base", "accuracy_novel")
"""Metrics of which sums and counts by image are remembered."""


@dataclass(frozen=True, kw_only=True)
class Run(StudyRun):
    """One study; the teachers' image towers become the encoders of OV-SAMs."""

    other_teachers: tuple[str, ...] = ()
    """More CLIP checkpoints, such as a vision transformer's, to compare with at equal compute."""
    training: ovsam_configs.Run = field(default_factory=ovsam_configs.pictograms)
    """Settings of all trainings; the study sets seed, teacher and storage."""
    vocabulary_sizes: tuple[int, ...] = (68, 1_203, 5_000, 22_000)
    """Numbers of competing names: the box set's own and distractors."""
    distractors: str = ""
    """A file with a name per line, such as LVIS's and ImageNet-21k's; if empty, names are composed."""
    vocabulary_images: int = 100
    """Number of evaluation images to try more names on, after those of the main table; 0 for all."""
    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0)
    """CLIP's weights for base names to try: 0 is the label branch alone, 1 is CLIP alone."""
    betas: tuple[float, ...] = (0.0, 0.7, 0.8, 0.9, 1.0)
    """CLIP's weights for novel names to try with each."""
    novel_biases: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Biases of novel names to try with each."""
    detectors: tuple[str, ...] = ()
    """Folders or URIs of ViLD or CoDet checkpoints, whose boxes are segmented and named."""
    detector_images: int = 0
    """Number of evaluation images to run the detectors on; 0 for all."""


def pictograms() -> Run:
    """Three seeds; requires `--teacher`."""
    return Run()


def smoke() -> Run:
    """One seed, five steps; requires `--teacher`."""
    return Run(
        training=replace(ovsam_configs.smoke(), text_to_mask=False),
        seeds=(0,),
        vocabulary_sizes=(68, 100),
        alphas=(1.0,),
        betas=(1.0,),
        novel_biases=(0.0, 1.0),
        vocabulary_images=2,
        detector_images=2,
    )


CONFIGS: dict[str, Callable[[], Run]] = {"pictograms": pictograms, "smoke": smoke}


def ovsam_study(run: Run) -> Study:
    """The study of a run.

    Raises:
        InputError: the teacher or a table is missing, or there are too few distractors.
    """
    studies.require_teacher(run.teacher)
    names = competing_names(run.storage, run.training.boxes, run.vocabulary_sizes, run.distractors)
    measurements: list[Measurement] = [
        partial(measure_first, run),
        *(partial(measure_teacher, run, number, teacher) for number, teacher in enumerate(run.other_teachers, 1)),
        *(partial(measure_names, run, names[:size]) for size in run.vocabulary_sizes),
        partial(measure_fusions, run),
        *(partial(measure_detector, run, detector) for detector in run.detectors),
    ]
    return Study(
        name="ovsam_study",
        storage=run.storage,
        seeds=run.seeds,
        measurements=measurements,
        claims=study_claims(run),
        tables=result_tables,
    )


def study_claims(run: Run) -> list[Claim]:
    """The claims about all prompts, vocabulary sizes and teachers of a study."""
    claims = [Claim("IoU, box: SAM", "iou_all", "sam, box", tested="mean", at_least=0.85)]
    for kind in (*PROMPT_KINDS, *(f"{size} names" for size in run.vocabulary_sizes)):
        for group, variants in (("image crop", IMAGE_CROPS), ("CLIP features", FEATURES)):
            claim = Claim(
                f"novel accuracy, {kind}: OV-SAM above the best baseline of {group}",
                "accuracy_novel",
                f"ovsam, {kind}",
                tuple(f"{variant}, {kind}" for variant in variants),
                at_least=0.05 if kind == "box" else 0.0,
                paper=PAPER.get((kind, group)),
                source="accuracy of all names on COCO, Table 1",
            )
            claims.append(claim)
    for kind in PROMPT_KINDS:
        ours, sam = f"ovsam, {kind}", f"sam, {kind}"
        claims.append(
            Claim(f"IoU, {kind}: OV-SAM close to its SAM", "iou_all", ours, (sam,), tested="mean", at_least=-0.02)
        )
        for number in range(1, len(run.other_teachers) + 1):
            for label, metric in (("IoU", "iou_all"), ("novel accuracy", "accuracy_novel")):
                statement = f"{label}, {kind}: first teacher above teacher {number}"
                claims.append(Claim(statement, metric, ours, (f"teacher {number}: {ours}",)))
    return claims


# --------------------------------------------------------------------------------------------------------- trainings


def train_sam(own: ovsam_configs.Run, seed: int) -> str:
    """The folder of a seed's SAM; its result's name depends on the settings of the SAM alone."""
    if own.sam:
        return own.sam
    settings = ovsam_configs.Run(
        config="",
        storage=own.storage,
        boxes=own.boxes,
        sam_model=own.sam_model,
        sam_training=own.sam_training,
        batch_size=own.batch_size,
        augmentation=own.augmentation,
        sam_stage=own.sam_stage,
        sam2clip_stage=own.sam_stage,
        clip2sam_stage=own.sam_stage,
    )
    result = studies.remember("ovsam", seed, "sam", settings, lambda settings: {"sam": ovsam.teach_sam(settings)})
    return str(result["sam"])


def seed_training(run: Run, seed: int) -> ovsam_configs.Run:
    """The training of a seed with its SAM."""
    own = studies.seeded(run.training, run.storage, run.teacher, seed)
    return replace(own, sam=train_sam(own, seed))


def train_ovsam(own: ovsam_configs.Run, seed: int, name: str = "ovsam") -> dict[str, Any]:
    """Checkpoints and metrics by `<variant>, <prompt>` and `<variant>, cost` of an OV-SAM.

    `by_image` has the sums and counts of `BY_IMAGE` in each image, by `<variant>, <prompt>`.
    """

    def job(own: ovsam_configs.Run) -> dict[str, Any]:
        trained = ovsam.train(own)
        rows = {", ".join(key): dict(values) for key, values in trained.metrics.rows.items()}
        costs = {f"{variant}, cost": asdict(cost) for variant, cost in trained.metrics.costs.items()}
        by_image = {
            ", ".join(key): {name: [values.tolist() for values in of[name]] for name in BY_IMAGE}
            for key, of in trained.metrics.by_image.items()
        }
        outputs = {"model": trained.model, "sam": trained.outputs["sam"], "seconds": trained.seconds}
        return {**outputs, "rows": rows | costs, "by_image": by_image}

    return studies.remember("ovsam", seed, name, own, job)


def at_equal_compute(own: ovsam_configs.Run, model: str) -> ovsam_configs.Run:
    """The training with as many operations as that of another OV-SAM: its steps are scaled by the cost of a step."""
    clip, _ = ovsam_inputs.open_clip_teacher(own)
    reference = load_model(storage.local_folder(model), OvSam)
    other = OvSam(ovsam_inputs.model_config(own, reference.config.sam, clip))
    stages = zip(
        (own.sam2clip_stage, own.clip2sam_stage),
        step_operations(reference, own),
        step_operations(other, own),
        strict=True,
    )
    scaled = [replace(stage, steps=max(1, round(stage.steps * (theirs / ours)))) for stage, theirs, ours in stages]
    return replace(own, sam2clip_stage=scaled[0], clip2sam_stage=scaled[1])


def step_operations(model: OvSam, own: ovsam_configs.Run) -> list[int]:
    """Operations of a step of `sam2clip` and of `clip2sam` with one image, forward and backward."""
    sam = model.config.sam
    image = torch.zeros(3, sam.image_size, sam.image_size, dtype=torch.uint8)
    features = torch.zeros(1, sam.prompt_width, sam.embedding_side, sam.embedding_side)
    masks = MaskBatch((image,), (torch.ones_like(image[:1], dtype=torch.bool),), (torch.zeros(1, dtype=torch.int64),))
    text_KYD = torch.zeros(1, 1, model.config.tower.embed_dim)

    def operations(module: nn.Module, *inputs: Any) -> int:
        def step() -> None:
            torch.stack(list(module(*inputs).values())).sum().backward()  # type: ignore[no-untyped-call]

        return pointing_report.count_flops(step)

    # One after the other: each training freezes the parts of the model that it does not train.
    return [
        operations(Sam2ClipTraining(model), FeatureBatch((image,), features)),
        operations(Clip2SamTraining(model, own.clip2sam), masks, text_KYD),
    ]


# ------------------------------------------------------------------------------------------------------ measurements


def measure_first(run: Run, seed: int) -> dict[str, Metrics]:
    """IoU, accuracy and cost of SAM, the baselines and the OV-SAM of the first teacher."""
    rows: dict[str, Metrics] = train_ovsam(seed_training(run, seed), seed)["rows"]
    return rows


def measure_teacher(run: Run, number: int, teacher: str, seed: int) -> dict[str, Metrics]:
    """The same with another teacher, and accuracy with other weights of CLIP; without SAM, which teachers share."""
    own = seed_training(run, seed)
    own = at_equal_compute(replace(own, teacher=teacher), train_ovsam(own, seed)["model"])
    trained = train_ovsam(own, seed, f"teacher-{number}")
    rows = {name: metrics for name, metrics in trained["rows"].items() if not name.startswith("sam, ")}
    rows |= fuse(run, own, seed, trained["model"])
    return {f"teacher {number}: {name}": metrics for name, metrics in rows.items()}


def measure_names(run: Run, names: Sequence[str], seed: int) -> dict[str, Metrics]:
    """Accuracy with box prompts among these names, the box set's own first."""
    own = seed_training(run, seed)
    trained = train_ovsam(own, seed)

    def job(own: ovsam_configs.Run) -> dict[str, Metrics]:
        folder = storage.local_folder(trained["model"])
        device = training.device_of(own.clip2sam_stage)
        model, info = load_model(folder, OvSam).to(device), read_info(folder)
        sam = load_model(storage.local_folder(trained["sam"]), SamModel).to(device)
        _, encoder = ovsam_inputs.open_clip_teacher(own)
        vocabulary = build_vocabulary(
            StoredEncoder(encoder, TextStore(run.storage, encoder.teacher)), names, info.splits
        ).to(torch.device(device))
        categories = tables.read_table(run.storage, "categories", own.boxes).to_pylist()
        labels = {row["category_id"]: names.index(row["name"]) for row in categories if row["split"]}
        rows = held_out_images(own)[: run.vocabulary_images or None]
        images = pointing_report.read_objects(run.storage, rows, labels, device)
        collected, _ = pointing_report.segment_objects(images, vocabulary, model, sam, kinds=["box"])
        return {
            f"{variant}, {len(names)} names": {key: values[key] for key in ("accuracy_base", "accuracy_novel")}
            for (variant, _), values in pointing_report.summarise(collected).items()
            if variant != "sam"
        }

    return studies.remember("ovsam", seed, f"names-{len(names)}", own, job, names, run.vocabulary_images)


def measure_fusions(run: Run, seed: int) -> dict[str, Metrics]:
    """Accuracy with other weights of CLIP."""
    own = seed_training(run, seed)
    return fuse(run, own, seed, train_ovsam(own, seed)["model"])


def fuse(run: Run, own: ovsam_configs.Run, seed: int, folder: str) -> dict[str, Metrics]:
    """Accuracy with box prompts for all weights of CLIP and biases, from one pass over `held_out_images`."""
    settings = list(itertools.product(run.alphas, run.betas, run.novel_biases))

    def job(own: ovsam_configs.Run) -> dict[str, Metrics]:
        device = training.device_of(own.clip2sam_stage)
        model = load_model(storage.local_folder(folder), OvSam).to(device)
        _, encoder = ovsam_inputs.open_clip_teacher(own)
        names = ovsam_inputs.read_names(own, encoder)
        labels = {names.ids[name]: label for label, name in enumerate(names.vocabulary.names)}
        vocabulary = names.vocabulary.to(torch.device(device))
        parts, truth = [], []
        for objects in pointing_report.read_objects(run.storage, held_out_images(own), labels, device):
            encoded = model.encode(objects.image)
            predicted, boxes_P4 = model.masks(encoded, objects.prompts("box"))
            scores = model.score_names(encoded, predicted, vocabulary, boxes_P4)
            parts.append([value.cpu() for value in scores])
            truth += objects.labels
        head_PK, clip_PK, seen_P = (torch.cat(part) for part in zip(*parts, strict=True))
        label_P, is_base_K = torch.tensor(truth), cast(torch.Tensor, names.vocabulary.is_base)
        base_P = is_base_K[label_P]
        accuracies: dict[str, Metrics] = {}
        for alpha, beta, bias in settings:
            scores_PK = fuse_scores(head_PK, clip_PK, is_base_K, seen_P, alpha=alpha, beta=beta, novel_bias=bias)
            correct_P = (scores_PK[:, :-1].argmax(1) == label_P).double()
            accuracies[fusion_name(alpha, beta, bias)] = {
                "accuracy_base": float(correct_P[base_P].mean()),
                "accuracy_novel": float(correct_P[~base_P].mean()),
            }
        return accuracies

    return studies.remember("ovsam", seed, "fusions", own, job, settings)


def fusion_name(alpha: float, beta: float, bias: float) -> str:
    """The variant with these weights of CLIP and this bias of novel names."""
    return f"alpha {alpha:g}, beta {beta:g}, bias {bias:g}"


def held_out_images(own: ovsam_configs.Run) -> list[dict[str, Any]]:
    """Rows of the evaluation set outside the main table; all if that uses all."""
    rows = tables.read_table(own.storage, "boxes", f"{own.boxes}-eval").to_pylist()
    return (rows[own.eval_images :] if own.eval_images else []) or rows


def measure_detector(run: Run, detector: str, seed: int) -> dict[str, Metrics]:
    """Mask AP on a detector's boxes."""
    own = seed_training(run, seed)
    trained = train_ovsam(own, seed)
    settings = ovsam_boxes.Run(
        storage=run.storage,
        model=trained["model"],
        sam=trained["sam"],
        boxes=own.boxes,
        images=run.detector_images,
        device=training.device_of(own.clip2sam_stage),
    )

    def job(own: ovsam_configs.Run) -> dict[str, Metrics]:
        return {f"{detector}: {name}": metrics for name, metrics in ovsam_boxes.mask_ap(settings, detector).items()}

    return studies.remember("ovsam", seed, "boxes", own, job, detector, run.detector_images)


# ------------------------------------------------------------------------------------------------------------ report


def result_tables(results: Results) -> list[str]:
    """Markdown: IoU and accuracy, cost, accuracy among more names and with other weights of CLIP, mask AP."""
    ious = {"IoU base": "iou_base", "IoU novel": "iou_novel", "IoU all": "iou_all"}
    accuracies = {"accuracy base": "accuracy_base", "accuracy novel": "accuracy_novel"}
    names = {variant: result for variant, result in results.items() if variant.endswith(" names")}
    return [
        *studies.metric_table(results, "", ious | accuracies, each="accuracy_novel"),
        *cost_tables(results),
        *studies.metric_table(names, "held-out images", accuracies),
        *fusion_table(results),
        *studies.metric_table(results, "boxes: masks", ovsam_boxes.COLUMNS),
    ]


def fusion_table(results: Results) -> list[str]:
    """Markdown: weights of CLIP by teacher, sorted by the harmonic mean of base and novel accuracy."""
    fusions = []
    for variant, result in results.items():
        teacher, found, _ = variant.partition("alpha")
        if found:
            base, novel = result.mean("accuracy_base"), result.mean("accuracy_novel")
            fusions.append((teacher, 2 * base * novel / max(base + novel, 1e-9), base, novel, variant))
    fusions.sort(key=lambda row: (row[0], -row[1]))
    rows = [[name, f"{base:.3f}", f"{novel:.3f}", f"{harmonic:.3f}"] for _, harmonic, base, novel, name in fusions]
    return studies.table([["held-out images", "accuracy base", "accuracy novel", "harmonic mean"], *rows])


def cost_tables(results: Results) -> list[str]:
    """Markdown: cost of an image with four named boxes, and OV-SAM's cost relative to the best baselines'."""
    costs = {name.removesuffix(", cost"): result for name, result in results.items() if name.endswith(", cost")}
    rows = [["cost", "parameters", "GFLOP", "encode", "one more prompt"]]
    for variant, cost in costs.items():
        size, flops = f"{cost.mean('parameters'):,.0f}", f"{cost.mean('flops') / 1e9:.2f}"
        rows.append([variant, size, flops, f"{cost.mean('encode_ms'):.1f} ms", f"{cost.mean('prompt_ms'):.1f} ms"])
    ratios = [["OV-SAM relative to", "parameters", "operations"]]
    for variants in (IMAGE_CROPS, FEATURES):
        best = studies.best_variant(results, (f"{variant}, box" for variant in variants), "accuracy_novel")
        if best:
            ours, theirs = costs["ovsam"], costs[best.removesuffix(", box")]
            ratios.append([best, *(f"{ours.mean(key) / theirs.mean(key):.2f}" for key in ("parameters", "flops"))])
    return [*studies.table(rows), *studies.table(ratios)]


def main() -> None:
    """Run the study."""
    run = cli.parse(CONFIGS, __doc__)
    if run.training.config == "smoke":
        prepare_boxes.prepare(replace(boxes_configs.smoke(), storage=run.storage))
    studies.run_study(ovsam_study(run))


if __name__ == "__main__":
    cli.execute(main)
