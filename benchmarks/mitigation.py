"""What mitigation does to memorization and retrieval: `python -m benchmarks.mitigation WORK`.

Emoji, as a picture and a name, or two vendors' pictures and a name; or pairs of a finished run,
whose captions are the whole, its title and the rest (`--run`, with a WORK of its own). f trains on
shared and candidate samples, g on shared and independent ones (`curate.memorization.protocol`),
with 10 % of all names swapped, in a plain loop over the pieces of `curate.mitigation`. Every arm
has the same samples, swaps, first weights and number of steps; memorization is that of the
candidates that were not swapped, and R@10 that of external samples, of f and g on average. The
curated arms leave out what the score stage and `select.max_mismatch_rate` find in all training
samples.

Each model is a file in WORK, so that a run that was stopped goes on. Prints one JSON line;
`--table` prints the same for people to read.

References: Wang et al., MultiMem (arXiv:2606.22220) and CLIPMem (arXiv:2502.07830), mitigation.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from open_clip.model import CLIP
from PIL import Image
from torch import Tensor

from benchmarks.corpora import DEFAULT_CACHE
from benchmarks.emoji import EMOJI_VENDORS, emoji_captions, read_emoji
from benchmarks.memorization import mean_of, rare_rows
from benchmarks.noise import plant
from benchmarks.parts import find_titles, split_parts
from benchmarks.signature import (
    IMAGE_PX,
    Samples,
    embed,
    join_groups,
    read_pair_vectors,
    read_pairs,
)
from benchmarks.signature_three import group_emoji, read_pixels
from benchmarks.trial import Corpus, embed_captions, embed_pictures, run_score
from curate import storage
from curate.audit import Embeddings, measure
from curate.engine.workers import keep_freed_memory
from curate.formats.pixels import read_square
from curate.memorization.folds import hash_unit
from curate.memorization.metrics import clipmem, multimem
from curate.memorization.protocol import draw_sets, training_masks
from curate.memorization.retrieval import hits_at
from curate.mitigation import CaptionSampler, EmbeddingNoise, TargetedBatches, TextMask
from curate.models.clip_proxy import (
    ClipShape,
    GroupedClipLoss,
    build_clip,
    choose_words,
    encode,
    fold_tokens,
    normalise_pixels,
    tokenize,
)
from curate.models.precision import pick_dtype
from curate.models.train_clip import augment_pixels
from curate.stages.score import Score
from curate.stages.select import mismatch_limit

Array = np.ndarray[Any, Any]

SETTINGS = {"two": EMOJI_VENDORS[:1], "three": EMOJI_VENDORS, "run": ("picture",)}
_NAME = "name"
_RAW = "raw"
_PX = 32
_SIZE = {"image_px": _PX, "image_width": 16, "text_width": 64, "text_layers": 1}
_BATCH = 64
_RATE, _DECAY = 2e-3, 0.05
_SWAPS = 0.1
_CAPTIONS = 5
#: Of the external samples, those that agreement is measured against; the rest are tested on.
_UNRELATED = 0.25
#: What is asked of the kept, as `select.max_mismatch_rate`.
_MAX_RATE = 0.02
#: Words of a target that are hidden, besides two random crops.
_TARGET_MASK = 0.3


@dataclass(frozen=True)
class Arm:
    """What is done while a model trains.

    Parameters
    ----------
    noise : float
        Sigma.
    noisy : str
        Which modalities it is added to: "all", "pictures", "first" (picture) or "name".
    captions : int
        That a sample's name is drawn of.
    mask : float
        Share of words hidden.
    every : int
        Epochs after which the top 5 % are chosen again for augmentation; 0: never.
    curated : bool
    """

    noise: float = 0.0
    noisy: str = "all"
    captions: int = 1
    mask: float = 0.0
    every: int = 0
    curated: bool = False

    def sigmas(self, modalities: list[str]) -> dict[str, float]:
        """Sigma by modality; the name is the last one."""
        chosen = {
            "all": modalities, "name": modalities[-1:], "pictures": modalities[:-1],
            "first": modalities[:1],
        }[self.noisy]  # fmt: skip
        return dict.fromkeys(chosen, self.noise)


_MITIGATED = Arm(noise=0.05, captions=3, mask=0.15)
ARMS = {
    _RAW: Arm(),
    "noise on all": Arm(noise=0.1),
    "noise on name": Arm(noise=0.15, noisy="name"),
    "noise on first picture": Arm(noise=0.15, noisy="first"),
    "five captions": Arm(captions=_CAPTIONS),
    "words masked": Arm(mask=0.15),
    "targeted": Arm(every=5),
    "curated": Arm(curated=True),
    "mitigated": _MITIGATED,
    "curated and mitigated": replace(_MITIGATED, curated=True),
    "curated, three captions": Arm(captions=3, curated=True),
    "curated, five captions": Arm(captions=_CAPTIONS, curated=True),
    "curated, captions and masks": Arm(captions=3, mask=0.15, curated=True),
    "two captions, masks 30": Arm(captions=2, mask=0.3),
    "curated, two captions": Arm(captions=2, curated=True),
    "curated, two captions, masks 15": Arm(captions=2, mask=0.15, curated=True),
    "curated, two captions, masks 30": Arm(captions=2, mask=0.3, curated=True),
    "curated, three captions, masks 30": Arm(captions=3, mask=0.3, curated=True),
    "curated, masks 30": Arm(mask=0.3, curated=True),
}


@dataclass(frozen=True)
class Data:
    """Emoji as models see them, before swaps.

    Parameters
    ----------
    modalities : list of str, length I + 1
    pixels : (I, N, 3, S, S) uint8
    captions : list of N lists of (L,) int64
        The name first.
    words : int
        Of the vocabulary.
    corpus : Corpus
        First picture and name of the same rows, for scores.
    rare : (N,) bool
    """

    modalities: list[str]
    pixels: Array
    captions: list[list[Array]]
    words: int
    corpus: Corpus
    rare: Array

    def samples(self) -> Samples:
        """Return pictures and names, for `embed`."""
        names = np.stack([known[0] for known in self.captions])
        groups = self.corpus.clusters.tolist()
        return Samples(self.modalities, self.pixels, names[None], self.words, groups)


def read_data(cache: Path) -> Data:
    """Read all emoji of both vendors."""
    emoji = read_emoji(cache, EMOJI_VENDORS, ("en",))
    known = emoji_captions(cache)
    captions = [known[one.code][:_CAPTIONS] for one in emoji]
    pictures = zip(*(one.images for one in emoji), strict=True)
    pixels = np.stack([np.stack([read_pixels(data) for data in part]) for part in pictures])
    shown = [Image.fromarray(picture.transpose(1, 2, 0)) for picture in pixels[0]]
    vectors = embed_pictures(shown), embed_captions([part[0] for part in captions])
    uids = [one.code for one in emoji]
    return make_data(pixels, captions, group_emoji(emoji, pixels), uids, vectors)


def read_run(out: Path, limit: int) -> Data:
    """Read so many pairs of a finished run, the first by hash."""
    table = read_pairs(out, limit)
    uids, captions, clusters = (table[n].to_pylist() for n in ("uid", "caption", "cluster_id"))
    pixels = np.stack([read_square(data, IMAGE_PX) for data in table["thumbnail"].to_pylist()])
    said = [
        tell_apart(caption, title)
        for caption, title in zip(captions, find_titles(captions, clusters), strict=True)
    ]
    groups, vectors = join_groups([clusters, captions]), read_pair_vectors(out, uids)
    return make_data(pixels[None], said, groups, uids, vectors, SETTINGS["run"])


def tell_apart(caption: str, title: str) -> list[str]:
    """Return a caption, its title, and its other parts, as far as these differ."""
    rest = " ".join(part for part in split_parts(caption) if part != title)
    return list(dict.fromkeys(filter(None, (caption, title, rest))))


def make_data(
    pixels: Array,
    captions: list[list[str]],
    groups: list[str],
    uids: list[str],
    vectors: tuple[Array, Array],
    pictures: Sequence[str] = EMOJI_VENDORS,
) -> Data:
    """Tokenize captions and shrink pictures, (I, N, 3, S, S) uint8.

    Parameters
    ----------
    captions : list of N lists of str
        The name first.
    vectors : ((N, D) float32, (N, E) float32)
        Of the first pictures and the names.
    pictures : sequence of str, length I
        Names of these modalities.
    """
    names, spelt, alike = map(np.array, ([part[0] for part in captions], uids, groups))
    plain = np.full(len(uids), "clean")
    corpus = Corpus(spelt, names, alike, plain, alike, plain, plain, *vectors, Path("none"))
    tokens = tokenize([caption for part in captions for caption in part])
    words = choose_words(Counter(tokens.ravel().tolist()))
    ends = np.cumsum([len(part) for part in captions])[:-1]
    folded = [list(part) for part in np.split(fold_tokens(tokens, words), ends)]
    sizes = (*pixels.shape[:2], 3, _PX, pixels.shape[3] // _PX, _PX, pixels.shape[4] // _PX)
    small = pixels.reshape(sizes).mean((4, 6)).round().astype(np.uint8)
    return Data([*pictures, _NAME], small, folded, len(words), corpus, rare_rows(corpus))


def cut_modalities(data: Data, setting: str) -> Data:
    """Leave the pictures of a setting's vendors."""
    count = len(SETTINGS[setting])
    return replace(data, modalities=[*SETTINGS[setting], _NAME], pixels=data.pixels[:count])


class Rows:
    """Training samples, each epoch in an order of its own.

    Parameters
    ----------
    data : Data
    rows : (M,) int
    donors : (N,) int
        Whose captions a row has.
    captions : int
        That the name is drawn of.
    seed : int
    """

    def __init__(self, data: Data, rows: Array, donors: Array, captions: int, seed: int) -> None:
        self._data, self._rows, self._donors = data, rows, donors
        self._sampler, self._seed, self._epoch = CaptionSampler(captions, seed), seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = np.random.default_rng((self._seed, self._epoch)).permutation(self._rows)
        for row in order.tolist():
            yield self._sampler({
                "uid": str(row),
                "row": row,
                "pictures": torch.from_numpy(self._data.pixels[:, row]),
                "captions": self._data.captions[self._donors[row]],
            })  # fmt: skip


def augment_target(mask: TextMask, sample: dict[str, Any]) -> dict[str, Any]:
    """Crop a sample's pictures once more than those of others, and hide some words."""
    again = augment_pixels(sample["pictures"]).round().to(torch.uint8)
    hidden = mask(torch.from_numpy(sample["caption"])[None])[0].numpy()
    return {**sample, "pictures": again, "caption": hidden}


def train(
    data: Data, rows: Array, donors: Array, arm: Arm, steps: int, seed: int, unrelated: Array
) -> CLIP:
    """Train one model for so many steps; `unrelated` (H,) int are rows that it never sees."""
    torch.manual_seed(seed)
    model, dtype = build_clip(ClipShape(data.words, **_SIZE)), pick_dtype("cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, steps, pct_start=0.1)
    marks = (data.words + 2, data.words + 3)  # of the folded vocabulary
    noise = EmbeddingNoise(arm.sigmas(data.modalities)).train()
    mask = TextMask(arm.mask, keep=marks).train()
    hide = TextMask(_TARGET_MASK, keep=marks).train()
    batches = TargetedBatches(
        Rows(data, rows, donors, arm.captions, seed), _BATCH,
        lambda sample: augment_target(hide, sample), every=max(1, arm.every),
    )  # fmt: skip
    codes = torch.from_numpy(np.unique(data.corpus.clusters, return_inverse=True)[1])
    done = epoch = 0
    model.train()
    while done < steps:
        batches.set_epoch(epoch)
        if arm.every and batches.due(epoch):
            batches.update(score_rows(model, data, rows, donors, unrelated))
        for batch in batches:
            seen = torch.stack([sample["pictures"] for sample in batch], 1).flatten(0, 1)
            words = mask(torch.from_numpy(np.stack([sample["caption"] for sample in batch])))
            pixels = normalise_pixels(augment_pixels(seen))
            image, text = encode(model, pixels, words, dtype)
            parts = [*image.view(-1, len(batch), image.shape[1]), text]
            noisy = noise(dict(zip(data.modalities, parts, strict=True)))
            # As everywhere, pairs with one picture or one name are not rivals.
            kinds = [codes[[sample["row"] for sample in batch]]]
            kinds += [codes[donors[[sample["row"] for sample in batch]]]]
            alike = torch.stack([kind[:, None] == kind for kind in kinds]).any(0)
            loss = mean_loss(noisy, alike, model.logit_scale.exp())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, np.log(100))
            done += 1
            if done == steps:
                break
        epoch += 1
    return model.eval().requires_grad_(False)


def mean_loss(parts: dict[str, Tensor], alike: Tensor, scale: Tensor) -> Tensor:
    """Mean of the contrastive losses of all pairs of modalities."""
    measured = GroupedClipLoss(alike)
    return torch.stack([measured(*pair, scale) for pair in combinations(parts.values(), 2)]).mean()


def score_rows(
    model: CLIP, data: Data, rows: Array, donors: Array, unrelated: Array
) -> dict[str, float]:
    """Memorization of training samples by the model alone: uid to value."""
    model.eval()
    trained = embed_rows(model, data, rows, donors)
    held_out = embed_rows(model, data, unrelated, donors)
    model.train()
    values = measure(Embeddings(trained, held_out)).scores["memorization"]
    return dict(zip(map(str, rows.tolist()), values.tolist(), strict=True))


def embed_rows(model: CLIP, data: Data, rows: Array, donors: Array) -> dict[str, Array]:
    """Embed rows with the names that they were given: (M, D) float32 by modality."""
    samples = data.samples()
    part = replace(samples, pixels=samples.pixels[:, rows], tokens=samples.tokens[:, donors[rows]])
    found = embed(model, part, 1, pick_dtype("cpu"))
    return {
        name: one.reshape(len(rows), -1) for name, one in zip(data.modalities, found, strict=True)
    }


class Bench:
    """One seed's sets and swaps, and the models that train on them.

    Parameters
    ----------
    data : Data
    seed : int
    epochs : dict of str to int
        Of a model on all of its samples, by setting.
    work : Path
    """

    def __init__(self, data: Data, seed: int, epochs: dict[str, int], work: Path) -> None:
        self.data, self.seed, self.epochs, self.work = data, seed, epochs, work
        clusters, count = data.corpus.clusters, len(data.rare)
        self.sets = draw_sets(clusters.tolist(), count // 2, count // 8, seed)
        self.pool = np.flatnonzero(self.sets != "external")
        spoilt, planted = plant(data.corpus.take(self.pool), "swap", _SWAPS, seed)
        self.spoilt = spoilt
        place = {name: row for row, name in enumerate(data.corpus.captions.tolist())}
        self.donors = np.arange(count)
        swapped = self.pool[planted]
        self.donors[swapped] = [place[name] for name in spoilt.captions[planted].tolist()]
        self.clean = np.flatnonzero((self.sets == "candidate") & (self.donors == np.arange(count)))
        external = np.flatnonzero(self.sets == "external")
        apart = hash_unit(clusters[external].tolist(), seed, "held out") < _UNRELATED
        self.unrelated, self.test = external[apart], external[~apart]

    @cached_property
    def kept(self) -> Array:
        """Whether the score stage leaves a row in, from the spoilt training samples: (N,) bool."""
        path = self.work / f"mismatch-{self.seed}.npy"
        if not path.exists():
            scored = run_score(self.spoilt, Score(seed=self.seed))
            storage.commit_array(str(path), scored.columns["mismatch_probability"])
        probability = np.nan_to_num(storage.read_array(str(path)))
        kept = np.ones(len(self.sets), bool)
        kept[self.pool] = probability <= mismatch_limit(probability, _MAX_RATE)[0]
        return kept

    def curation(self) -> dict[str, float]:
        """Tell what curation does to the training samples."""
        planted = (self.donors != np.arange(len(self.donors)))[self.pool]
        dropped = ~self.kept[self.pool]
        return {
            "dropped": float(dropped.mean()),
            "planted_dropped": float(dropped[planted].mean()),
            "clean_dropped": float(dropped[~planted].mean()),
            "candidates_dropped": float((~self.kept[self.clean]).mean()),
        }

    def embeddings(self, setting: str, name: str, arm: Arm) -> list[dict[str, Array]]:
        """Return what f and g make of clean candidates, unrelated and test rows, in this order."""
        return [self._embedded(setting, name, arm, number) for number in range(2)]

    def _embedded(self, setting: str, name: str, arm: Arm, number: int) -> dict[str, Array]:
        epochs, which = self.epochs[setting], "fg"[number]
        path = self.work / f"{setting}-{epochs}-{name.replace(' ', '_')}-{self.seed}-{which}.npy"
        data = cut_modalities(self.data, setting)
        if not path.exists():
            begun = time.monotonic()
            inside = training_masks(self.sets)[number]
            steps = int(inside.sum()) // _BATCH * epochs
            rows = np.flatnonzero(inside & self.kept if arm.curated else inside)
            seed = 1000 * self.seed + number
            model = train(data, rows, self.donors, arm, steps, seed, self.unrelated)
            judged = np.concatenate([self.clean, self.unrelated, self.test])
            found = embed_rows(model, data, judged, np.arange(len(self.donors)))
            storage.commit_array(str(path), np.stack(list(found.values())))
            click.echo(f"{path.stem}: {time.monotonic() - begun:.0f} s", err=True)
        return dict(zip(data.modalities, storage.read_array(str(path)), strict=True))

    def judge(self, models: list[dict[str, Array]]) -> dict[str, float]:
        """Return memorization of the clean candidates and retrieval on the test rows."""
        first, second = len(self.clean), len(self.clean) + len(self.unrelated)
        inside, unrelated, test = (
            [{name: part[rows] for name, part in model.items()} for model in models]
            for rows in (slice(first), slice(first, second), slice(second, None))
        )

        def memorized(names: list[str]) -> Array:
            both = [[model[name] for name in names] for model in (*inside, *unrelated)]
            return multimem(both[0], both[1], both[2], both[3])

        names, rare = list(models[0]), self.data.rare[self.clean]
        values = memorized(names)
        found = {
            "memorization": float(values.mean()),
            "memorization_rare": float(values[rare].mean()),
            **self._retrieve(test),
        }
        if len(names) == 2:
            pairs = [tuple(model[name] for name in names) for model in (*inside, *unrelated)]
            found["clipmem"] = float(clipmem(*pairs).mean())
        for pair in combinations(names, 2) if len(names) > 2 else ():
            found[f"memorization {' x '.join(pair)}"] = float(memorized(list(pair)).mean())
        return found

    def _retrieve(self, models: list[dict[str, Array]]) -> dict[str, float]:
        """R@10, the mean over models, pictures and both ways."""
        captions, rare = self.data.corpus.captions[self.test], self.data.rare[self.test]
        hits = np.mean([
            hits_at(*way, captions)
            for model in models
            for name in model if name != _NAME
            for way in ((model[name], model[_NAME]), (model[_NAME], model[name]))
        ], axis=0)  # fmt: skip
        return {
            "recall": float(hits.mean()),
            "recall_rare": float(hits[rare].mean()),
            "recall_rest": float(hits[~rare].mean()),
        }


def summarize(results: dict[tuple[int, str], dict[str, float]]) -> dict[str, Any]:
    """Mean and standard error over seeds by arm, and of changes relative to raw, seed by seed."""
    found: dict[str, Any] = {}
    for arm in dict.fromkeys(arm for _, arm in results):
        rows = {seed: row for (seed, other), row in results.items() if other == arm}
        names = next(iter(rows.values()))
        figures = {name: mean_of([row[name] for row in rows.values()]) for name in names}
        pairs = [(row, results.get((seed, _RAW))) for seed, row in rows.items()]
        changes = {
            name: mean_of([row[name] / raw[name] - 1 for row, raw in pairs if raw])
            for name in names
            if any(raw for _, raw in pairs)
        }
        found[arm] = {"seeds": len(rows), "figures": figures, "changes": changes}
    return found


def write_table(summary: dict[str, Any]) -> str:
    """Write a setting's summary as Markdown."""
    columns = list(next(iter(summary.values()))["figures"])
    lines = ["| arm | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for arm, row in summary.items():
        cells = []
        for name in columns:
            (mean, error), change = row["figures"][name], row["changes"].get(name)
            told = f" ({change[0]:+.0%} ± {change[1]:.0%})" if change and arm != _RAW else ""
            cells.append(f"{mean:.3f} ± {error:.3f}{told}")
        lines.append(f"| {arm} | {row['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--cache", default=DEFAULT_CACHE, show_default=True, type=click.Path(path_type=Path))
@click.option(
    "--arm",
    "arms",
    multiple=True,
    type=(click.Choice(list(SETTINGS)), click.Choice(list(ARMS))),
    help="Setting and arm; repeat for several. Default: all.",
)
@click.option(
    "--epochs",
    type=(int, int),
    default=(16, 8),
    show_default=True,
    help="Of a model on all its samples, of two and of three modalities.",
)
@click.option("--run", "out", type=click.Path(exists=True, path_type=Path), help="A finished run.")
@click.option("--limit", default=2000, show_default=True, help="Pairs of the run.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
@click.option("--table", is_flag=True, help="Print tables instead of one JSON line.")
def main(
    work: Path,
    cache: Path,
    arms: tuple[tuple[str, str], ...],
    epochs: tuple[int, int],
    out: Path | None,
    limit: int,
    seeds: tuple[int, ...],
    table: bool,
) -> None:
    """Train all arms and measure them."""
    keep_freed_memory()
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    settings = [name for name in SETTINGS if (name == "run") == (out is not None)]
    if any(setting not in settings for setting, _ in arms):
        raise click.UsageError("--arm run goes with --run, and no other setting does.")
    data = read_data(cache.expanduser()) if out is None else read_run(out, limit)
    results: dict[str, dict[tuple[int, str], dict[str, float]]] = {}
    curation = {}
    for seed in seeds:
        bench = Bench(data, seed, {"two": epochs[0], "three": epochs[1], "run": epochs[0]}, work)
        curation[seed] = bench.curation()
        for setting, name in arms or product(settings, ARMS):
            models = bench.embeddings(setting, name, ARMS[name])
            results.setdefault(setting, {})[seed, name] = bench.judge(models)
    summary = {setting: summarize(found) for setting, found in results.items()}
    if table:
        for setting, found in summary.items():
            click.echo(f"{setting}\n\n{write_table(found)}")
    else:
        click.echo(json.dumps({"epochs": epochs, "curation": curation, **summary}))


if __name__ == "__main__":
    main()
