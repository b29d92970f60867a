"""Span corruption: stretches of a text are taken out and have to be written down.

After Raffel et al. (arXiv 1910.10683, section 3.1.4 and figure 2). Of n tokens a share mask_prob is
noise, in spans of mean_span_length tokens on average that do not touch each other. Sentinels <0>,
<1>, ... stand where spans were; the target repeats each sentinel before its span and ends with one
sentinel more, which says that nothing is left:

    text            Thank you for inviting me to your party last week
    encoder input   Thank you <0> me to your party <1> week
    target          <0> for inviting <1> last <2>

How many tokens are noise and in how many spans depends on n alone; where the spans are is random.
Where the decoder is too short for a share of mask_prob, there are fewer of them.
"""

import bisect
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron.errors import ConfigError

Tokens = npt.NDArray[np.int64]

SHORTEST_TEXT = 2  # one token stays and one is taken out
SHORTEST_TARGET = 3  # of one token: <0> token <1>


@dataclass(frozen=True)
class SpanCorruption:
    """How text is corrupted: mask_prob of it, in spans of mean_span_length tokens on average.

    seq_length, decoder_seq_length: the most tokens of an encoder input and of a target.
    """

    mask_prob: float
    mean_span_length: float
    seq_length: int
    decoder_seq_length: int

    def __post_init__(self) -> None:
        if self.seq_length < SHORTEST_TEXT:
            raise ConfigError(
                f"--seq-length {self.seq_length} is too short: T5 needs at least {SHORTEST_TEXT}"
            )
        if self.decoder_seq_length < SHORTEST_TARGET:
            raise ConfigError(
                f"--decoder-seq-length {self.decoder_seq_length} is too short: T5 needs at least "
                f"{SHORTEST_TARGET}, a token between two sentinels"
            )

    @property
    def longest_text(self) -> int:
        """The most tokens of text whose corrupted form fits the encoder.

        More than seq_length as a rule, since a span leaves but its sentinel: 569 for 512.
        """
        # No text is longer than what both sides hold, and inputs never shrink as texts grow.
        texts = range(self.seq_length + self.decoder_seq_length + 1)
        return bisect.bisect_right(texts, self.seq_length, key=self._input_length) - 1

    @property
    def sentinels_needed(self) -> int:
        """The most sentinels that a sample can hold, the last of its target included."""
        return self.counts(self.longest_text)[1] + 1

    def counts(self, tokens: int) -> tuple[int, int]:
        """How many of so many tokens are noise, and in how many spans; 0, 0 below two tokens."""
        if tokens < SHORTEST_TEXT:
            return 0, 0
        share = max(1, round(self.mask_prob * tokens))
        noise = min(share, tokens - 1, self._most_noise())
        return noise, min(self._spans(noise), tokens - noise + 1)

    def apply(
        self, text: Tokens, sentinels: Tokens, random: np.random.Generator
    ) -> tuple[Tokens, Tokens]:
        """The encoder input and the target of a text: i64, within the two lengths.

        text: i64 of at most `longest_text`; sentinels: ids in the order of use, at least
        `sentinels_needed`. Every way to place the spans is as likely as any other.
        """
        noise, spans = self.counts(len(text))
        lengths = _composition(noise, spans, random)
        # Spans are apart, so that the gaps between them hold a token at least; those before the
        # first and behind the last may be empty.
        gaps = _composition(len(text) - noise + 2, spans + 1, random)
        gaps[0] -= 1
        gaps[-1] -= 1
        stretches = np.empty(2 * spans + 1, np.int64)
        stretches[0::2], stretches[1::2] = gaps, lengths
        is_noise = np.repeat(np.arange(len(stretches)) % 2 == 1, stretches)
        begins = is_noise.copy()
        begins[1:] &= ~is_noise[:-1]
        encoder = text.copy()
        encoder[begins] = sentinels[:spans]
        places = np.append(0, np.cumsum(lengths))
        target = np.insert(text[is_noise], places, sentinels[: spans + 1])
        return encoder[begins | ~is_noise], target

    def _spans(self, noise: int) -> int:
        return min(noise, max(1, round(noise / self.mean_span_length)))

    def _input_length(self, tokens: int) -> int:
        noise, spans = self.counts(tokens)
        return tokens - noise + spans

    def _most_noise(self) -> int:
        """The most tokens of noise of which the target fits the decoder."""
        amounts = range(self.decoder_seq_length)
        return bisect.bisect_right(amounts, self.decoder_seq_length, key=self._target_length) - 1

    def _target_length(self, noise: int) -> int:
        return noise + self._spans(noise) + 1


def _composition(total: int, parts: int, random: np.random.Generator) -> Tokens:
    """`total` cut into so many positive whole numbers, every way equally likely: i64 [parts]."""
    if parts == 0:
        return np.zeros(0, np.int64)
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False, shuffle=False)) + 1
    return np.diff(cuts, prepend=0, append=total)
