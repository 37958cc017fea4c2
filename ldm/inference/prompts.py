"""From a prompt as it is written to what a denoiser is given: tags are removed, and words may change over the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ldm.denoisers import Condition
from ldm.files.messages import printable
from ldm.inference.options import PLAIN, DrawOptions
from ldm.inference.progress import Evaluations
from ldm.inference.request import DrawRequest
from ldm.model.conditioner import Conditioner, in_batches
from ldm.samplers import Denoise, Variance, evaluations_of
from ldm.samplers.guidance import composed
from ldm.samplers.network_denoise import NetworkDenoise
from ldm.samplers.stock.scheduler import StockScheduler
from text.prompt_syntax import LoraTag, Untagged, unread, without_tags
from text.schedule import Segment, compose, prompt_schedule, segment_at

WEIGHTING, LORA_FOLDER, EMBEDDING = "--weighting a1111", "--lora-folder", "--embedding"


class ScheduledPart(NamedTuple):
    """The texts of a prompt, or of one of those that AND joins, over the steps; and its weight."""

    segments: list[Segment]
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A prompt as it is drawn."""

    text: str  # without tags
    parts: list[ScheduledPart]
    loras: tuple[LoraTag, ...]

    @property
    def is_plain(self) -> bool:
        """Whether it is one text for all steps."""
        return len(self.parts) == 1 and len(self.parts[0].segments) == 1


class PromptDenoisers(NamedTuple):
    """The denoisers with a prompt and with the negative one, which share a count of the evaluations."""

    with_prompt: Denoise
    without: Denoise
    counting: Callable[[Denoise], Denoise]  # wraps what the sampler evaluates, to count
    variance: Variance  # of the network's last evaluation with the prompt


class PromptReader:
    """Reads prompts for a model. tags: whether tags of LoRAs are read under any weighting, since a folder is given."""

    def __init__(self, conditioner: Conditioner, *, tags: bool, scheduler: StockScheduler | None = None) -> None:
        self.conditioner, self.tags, self.scheduler = conditioner, tags, scheduler
        table = conditioner.embeddings
        self._spellings = table.spellings if table else frozenset[str]()

    def _evaluations(self, request: DrawRequest) -> int:
        """Return the steps of a prompt: as in A1111, twice as many for a sampler that evaluates twice in a step."""
        return request.steps * evaluations_of(request.sampler, self.scheduler)

    def read(self, request: DrawRequest) -> Prompt:
        """Read the prompt of a checked request."""
        found = self._untagged(request.prompt, request.options)
        joined = compose(found.text) if request.options.weighting == "a1111" else None
        if joined is None:
            return Prompt(found.text, [ScheduledPart([Segment(request.steps, found.text)])], tuple(found.loras))
        parts = [ScheduledPart(prompt_schedule(part.text, self._evaluations(request)), part.weight) for part in joined]
        return Prompt(found.text, parts, tuple(found.loras))

    def read_negative(self, request: DrawRequest) -> ScheduledPart:
        """Read the negative prompt of a checked request; as in A1111, it has no LoRAs, and AND is a word in it."""
        text = self._untagged(request.negative_prompt, request.options).text
        if request.options.weighting == "none":
            return ScheduledPart([Segment(request.steps, text)])
        return ScheduledPart(prompt_schedule(text, self._evaluations(request)))

    def batches(self, requests: Sequence[DrawRequest], *, largest: int) -> list[list[tuple[DrawRequest, Prompt]]]:
        """Read checked requests and split them, in order, into batches of at most `largest` that are drawn together.

        Their LoRAs and negative prompts are the same, and so are the lengths of plain prompts; a prompt that changes
        has a batch of its own.
        """
        read = [(request, self.read(request)) for request in requests]
        keys = [
            (prompt.loras, request.negative_prompt, self.conditioner.chunks(prompt.text, request.options.weighting))
            if prompt.is_plain
            else (prompt.loras, request.negative_prompt, prompt.text)
            for request, prompt in read
        ]
        return in_batches(read, keys, largest=largest)

    def denoisers(
        self, prompts: Sequence[Prompt], request: DrawRequest, network: Callable[[Condition], NetworkDenoise]
    ) -> PromptDenoisers:
        """Return the denoisers of a batch of pictures: of several plain prompts of equal length, or of one prompt.

        request: any of the batch; network: makes a denoiser of a condition.
        """
        options, pictures = request.options, len(prompts)
        first, negative = prompts[0], self.read_negative(request)
        done = Evaluations(wanted=any(len(part.segments) > 1 for part in [*first.parts, negative]))

        def encode(texts: Sequence[str]) -> Condition:
            return self.conditioner(texts, options.weighting, options.clip_skip)

        def denoiser(part: ScheduledPart, texts: Sequence[str]) -> NetworkDenoise | ScheduledDenoise:
            if len(part.segments) == 1:
                return network(encode(texts))
            return changing(part, pictures, done, encode, network)

        texts = [[own.parts[i].segments[0].text for own in prompts] for i in range(len(first.parts))]
        parts = [denoiser(part, own) for part, own in zip(first.parts, texts, strict=True)]
        without: Denoise = denoiser(negative, [negative.segments[0].text] * pictures)
        with_prompt: Denoise = parts[0]
        if len(parts) > 1:
            without = remembered(without)
            with_prompt = composed(parts, [part.weight for part in first.parts], without)
        return PromptDenoisers(with_prompt, without, done.counting, parts[0].variance)

    def text(self, prompt: str, options: DrawOptions) -> str:
        """Return a prompt without its tags, if they are read."""
        return self._untagged(prompt, options).text

    def remarks(self, request: DrawRequest) -> list[str]:
        """List, a line each, what looks like syntax and is drawn as words, what is removed, and what is too long."""
        options, lines = request.options, []
        reads_tags = self.tags or options.weighting == "a1111"
        for prompt in (request.prompt, request.negative_prompt):
            found = unread(prompt, weighting=options.weighting, tags=reads_tags, embeddings=self._spellings)
            lines += [_remark(remedy, examples) for remedy, examples in found.items()]
            others = self._untagged(prompt, options).others
            lines += [f"the prompt has {tag}, which is not supported: it is left out" for tag in others]
        negative = self._untagged(request.negative_prompt, options).loras
        lines += [
            f"the negative prompt has {tag.written}, which works only in the prompt: it is left out" for tag in negative
        ]
        if options.weighting == "none":  # others read a prompt in chunks, however long
            for prompt in (request.prompt, request.negative_prompt):
                if lost := self.cut_off(prompt):
                    lines.append(f"a prompt is too long for the model, its end is ignored: {printable(lost)}")
        return list(dict.fromkeys(lines))

    def cut_off(self, prompt: str) -> str:
        """Return the part of a prompt beyond the text encoder's context length; "" if it fits."""
        return self.conditioner.cut_off(self.text(prompt, PLAIN))

    def _untagged(self, prompt: str, options: DrawOptions) -> Untagged:
        a1111 = options.weighting == "a1111"
        if not a1111 and not self.tags:
            return Untagged(prompt, [], [])
        return without_tags(prompt, all_kinds=a1111, kept=lambda tag: tag.lower() in self._spellings)


class ScheduledDenoise:
    """denoise(x_t, t) -> x0_hat with a condition that depends on how many evaluations are done."""

    def __init__(self, networks: Sequence[NetworkDenoise], segments: Sequence[Segment], at: Evaluations) -> None:
        """networks: one for each segment."""
        self.networks, self.segments, self.at = networks, segments, at
        self._last = networks[0]

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        self._last = self.networks[segment_at(self.segments, self.at.done)]
        return self._last(x_t, t)

    def variance(self) -> Tensor:
        return self._last.variance()


def changing(
    part: ScheduledPart,
    pictures: int,
    at: Evaluations,
    encode: Callable[[Sequence[str]], Condition],
    network: Callable[[Condition], NetworkDenoise],
) -> ScheduledDenoise:
    """Return a part's denoiser for several pictures of the same prompt.

    As in A1111, its texts are encoded together, so that all have as many chunks as the longest.
    """
    texts = list(dict.fromkeys(segment.text for segment in part.segments))
    conditions = encode(texts)
    networks = {text: network(_row(conditions, i, pictures)) for i, text in enumerate(texts)}
    return ScheduledDenoise([networks[segment.text] for segment in part.segments], part.segments, at)


def remembered(denoise: Denoise) -> Denoise:
    """Return a denoiser that keeps its last result: composed prompts and guidance evaluate the same one."""
    last: tuple[Tensor, Tensor, Tensor] | None = None

    def remembering(x_t: Tensor, t: Tensor) -> Tensor:
        nonlocal last
        if last is None or last[0] is not x_t or last[1] is not t:
            last = x_t, t, denoise(x_t, t)
        return last[2]

    return remembering


def _row(condition: Condition, row: int, pictures: int) -> Condition:
    context, mask, pooled = (
        value[row : row + 1].expand(pictures, *value.shape[1:])
        for value in (condition.context, condition.mask, condition.pooled)
    )
    return Condition(context, mask, pooled)


def _remark(remedy: str, examples: Iterable[str]) -> str:
    shown = ", ".join(dict.fromkeys(" ".join(example.split())[:40] for example in examples))
    match remedy:
        case "weighting":
            return f"the prompt has {shown}, drawn as words: {WEIGHTING} reads it as A1111 does"
        case "lora":
            return f"the prompt has {shown}, drawn as words: give the folder of its file with {LORA_FOLDER}"
        case "embedding":
            return f"the prompt has {shown}, drawn as words: give its file or folder with {EMBEDDING}"
        case _:
            return f"the prompt has {shown}, drawn as words: this syntax of other programs is not supported"
