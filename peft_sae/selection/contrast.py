"""What a selector sees: one SAE's features on two classes of text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import SelectionError
from ..sae.identity import SaeIdentity
from ..statistics.moments import FeatureMoments
from ..statistics.parts import ActivationHistogram, ExampleSample


@dataclass(frozen=True)
class Contrast:
    """Two classes of text, as one SAE sees them.

    Attributes:
        sae: the SAE.
        aligned: its features' moments on the texts to move towards.
        unaligned: the same on the texts to move away from.
        quantity: `activation`, or `attribution` if that was collected instead.
        decoder: decoder rows, [d_sae, d_in], as they are stored; None if the SAEs were not given.
        named: ids that the caller named for `explicit`, in that order.
        seed: seed for what is random.
    """

    sae: SaeIdentity
    aligned: FeatureMoments
    unaligned: FeatureMoments
    quantity: str = "activation"
    decoder: torch.Tensor | None = None
    named: tuple[int, ...] = ()
    seed: int = 0

    @property
    def live(self) -> torch.Tensor:
        """Whether a feature ever fires on either class, bool [d_sae]."""
        return (self.aligned.fired + self.unaligned.fired) > 0

    @property
    def raw_difference(self) -> torch.Tensor:
        """Difference of the mean activations before the SAE, aligned minus unaligned, float64 [width].

        Raises:
            SelectionError: the statistics do not have them.
        """
        if self.aligned.raw is None or self.unaligned.raw is None:
            raise SelectionError(
                f"The statistics at {self.sae.hook_name} have no raw activations. Collect them with "
                "`collect_statistics`."
            )
        return self.aligned.raw.mean - self.unaligned.raw.mean

    @property
    def histograms(self) -> tuple[ActivationHistogram, ActivationHistogram]:
        """The histograms of both classes.

        Raises:
            SelectionError: the statistics do not have them.
        """
        if self.aligned.histogram is None or self.unaligned.histogram is None:
            raise SelectionError(
                "The statistics have no histograms, which this selector needs. Collect them again with "
                "measures=Measures(histograms=True) (--measure histograms)."
            )
        return self.aligned.histogram, self.unaligned.histogram

    @property
    def samples(self) -> tuple[ExampleSample, ExampleSample]:
        """The sampled examples of both classes.

        Raises:
            SelectionError: the statistics do not have them.
        """
        if self.aligned.sample is None or self.unaligned.sample is None:
            raise SelectionError(
                "The statistics have no sample of examples, which this selector needs. Collect them again with "
                "measures=Measures(sample=2000) (--measure sample)."
            )
        return self.aligned.sample, self.unaligned.sample

    @property
    def unit_decoder(self) -> torch.Tensor:
        """Decoder rows of unit length, float32 [d_sae, d_in]; zero rows stay zero.

        Raises:
            SelectionError: the SAEs were not given.
        """
        if self.decoder is None:
            raise SelectionError(
                "This needs the SAEs' decoder directions, which statistics do not hold. Give saes=... to "
                "select_features."
            )
        return torch.nn.functional.normalize(self.decoder.detach().float().cpu(), dim=-1)
