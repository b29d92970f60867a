"""Whole-word masking as BERT is trained with it (Devlin et al., 2019, section 3.1)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MASKED, KEPT_FROM = 0.8, 0.9  # 80 % become [MASK], 10 % another token, 10 % stay


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden: mask_prob of them, at most `most` a sample, whole words together.

    mask: id of the mask token; ordinary: i64, ids that may replace a token; starts_word: bool
    [vocabulary], False for tokens that continue a word.
    """

    mask_prob: float
    most: int
    mask: int
    ordinary: npt.NDArray[np.int64]
    starts_word: npt.NDArray[np.bool_]

    def apply(
        self,
        tokens: npt.NDArray[np.int64],
        fixed: npt.NDArray[np.bool_],
        random: np.random.Generator,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The tokens with some hidden, and the positions of those, ascending.

        tokens: i64 [n]; fixed: bool [n], True where a special token stands, which is neither
        hidden nor part of a word.
        """
        positions = self._choose(tokens, fixed, random)
        fate = random.random(len(positions))
        others = self.ordinary[random.integers(0, len(self.ordinary), len(positions))]
        hidden = tokens.copy()
        hidden[positions] = np.where(
            fate < MASKED, self.mask, np.where(fate < KEPT_FROM, others, tokens[positions])
        )
        return hidden, positions

    def _choose(
        self,
        tokens: npt.NDArray[np.int64],
        fixed: npt.NDArray[np.bool_],
        random: np.random.Generator,
    ) -> npt.NDArray[np.int64]:
        """Positions of whole words drawn at random until their share is reached."""
        wanted = min(self.most, max(1, round(self.mask_prob * len(tokens))))
        candidates = np.flatnonzero(~fixed)
        # A truncated segment can begin inside a word: what is left of it is a word of its own.
        starts = self.starts_word[tokens[candidates]] | fixed[candidates - 1]
        bounds = np.append(np.flatnonzero(starts), len(candidates))
        lengths = np.diff(bounds).tolist()
        chosen: list[npt.NDArray[np.int64]] = [candidates[:0]]
        for word in random.permutation(len(lengths)).tolist():
            if lengths[word] <= wanted:
                wanted -= lengths[word]
                chosen.append(candidates[bounds[word] : bounds[word + 1]])
            if wanted == 0:
                break
        return np.sort(np.concatenate(chosen))
