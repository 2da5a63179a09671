"""Which blocks of a model a run's negative acted in, when other nodes skip blocks, or run several of them as one."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .blocks import Block, all_blocks
from .families import Family

log = logging.getLogger(__name__)


class Reach:
    """Of one run. blocks: the model's, before the run; selected: those of them that should see the negative."""

    def __init__(
        self, family: Family, blocks: Sequence[Block], selected: frozenset[Block], diffusion_model: Any
    ) -> None:
        self.family, self.blocks, self.selected = family, blocks, selected
        self.acted: set[Block] = set()
        """The selected ones whose attention over text ran."""
        self.regrouped: bool | None = None
        """Whether another node runs the blocks inside one of its own; None before the first pass."""
        self.each = family.text_attentions(diffusion_model)
        """How many attentions over text a block has, where nothing is in front of the text."""

    def look(self, diffusion_model: Any) -> None:
        """Before a pass: what the model's blocks are by now."""
        if self.regrouped is None:
            try:
                self.regrouped = all_blocks(self.family.block_counts(diffusion_model)) != set(self.blocks)
            except AttributeError:  # a block of another node's has not what ours have
                self.regrouped = True

    def note(self, ran: Tensor, reached: Tensor, recorded: bool, leading: int) -> None:
        """After a pass: how often each block ran, and its attentions over text. ``leading``: how many tokens of its own
        the model has put in front of the text. Raises ``RuntimeError`` where an attention ran more often than the block
        has it and it matters which block it was."""
        each = 1 if leading else self.each
        often = zip(self.blocks, ran.tolist(), reached.tolist(), strict=True)
        twice = [block for block, a, b in often if b > a * each]
        if twice and not self._is_all_the_same(recorded):
            raise _ran_more_often(twice[0], self.regrouped)
        if len(self.acted) < len(self.selected):
            at = (block for block, b in zip(self.blocks, reached.tolist(), strict=True) if b)
            self.acted |= self.selected & set(at)

    def _is_all_the_same(self, recorded: bool) -> bool:
        """Whether it makes no difference in which block an attention ran."""
        one_kind = len({kind for kind, _ in self.blocks}) == 1
        return bool(self.regrouped) and one_kind and not recorded and len(self.selected) == len(self.blocks)

    def finish(self) -> None:
        """After a run in which the negative reached the model. Raises ``RuntimeError`` if it acted in no block, warns
        if in fewer than were selected."""
        idle = [f"{kind}:{i}" for kind, i in sorted(self.selected - self.acted)]
        if not self.acted:
            raise RuntimeError(
                f"VSF: none of the blocks that should see the negative ({_some(idle)}) ran, so it had no effect. "
                "Another node skips them, or runs them as part of another block. Remove that node, or select others "
                "in blocks of VSF Model Patch."
            )
        if idle and not self.regrouped:
            log.warning(
                f"VSF: {len(idle)} of {len(self.selected)} blocks that should see the negative never ran "
                f"({_some(idle)}): another node skips them."
            )


def _ran_more_often(block: Block, regrouped: bool | None) -> RuntimeError:
    here = f"VSF: in {block[0]} block {block[1]} the attention over text ran more often than the block itself"
    if regrouped:
        return RuntimeError(
            f"{here}: another node runs several blocks as one (a cache such as WaveSpeed's FBCache), so VSF cannot "
            "tell which of them see the negative. Remove that node; where all blocks are of one type, an empty blocks "
            "input and no VSF Record are enough."
        )
    return RuntimeError(
        f"{here}. Another node attends to a text of its own there (NAG, or attention couple) that has just as many "
        "tokens as the prompt with the negative, so VSF cannot tell which is which. Change the negative by a word, or "
        "remove that node."
    )


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
