"""Sums that are added up, and weights that are spread, among ranks, while they compute.

    views of tensors → pieces of some megabytes → a carrier → the owner's views, or everybody's

A thread does it, one order after the other, the same on all ranks, while the main thread goes on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch

from largemerge.carriers import Carrier, Piece, cut, open_carrier, piece_bytes
from largemerge.distributed import Ranks
from largemerge.node import Node
from largemerge.streams import SideStream


class Exchange:
    """Carries out orders in the background; all ranks give the same orders, one after the other.

    Args:
        ranks: All of them.
        carrier: The way between all.
        device: Of the tensors.
        team: This rank's, and the way between its members, if it has one.
    """

    def __init__(
        self,
        ranks: Ranks,
        carrier: Carrier,
        device: torch.device,
        team: tuple[Sequence[int], Carrier] | None = None,
    ) -> None:
        self._ranks, self._carrier, self._device, self._team = ranks, carrier, device, team
        self._orders: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._stream = SideStream(device)
        # Where another rank is gone, this thread may stand still for ever; the process ends all the same.
        self._thread = threading.Thread(target=self._run, name="largemerge-exchange", daemon=True)
        self._thread.start()

    def add_up(self, views: Sequence[torch.Tensor], owner: int) -> Future[Any]:
        """Collective: the owner's tensors become the sums of all; the others' are of no use afterwards."""
        return self._order(views, lambda piece: self._carrier.add_up_(piece, owner))

    def copy(self, views: Sequence[torch.Tensor], owner: int) -> Future[Any]:
        """Collective: everybody's tensors become the owner's."""
        return self._order(views, lambda piece: self._carrier.copy_(piece, owner))

    def share(self, views: Sequence[torch.Tensor]) -> Future[Any]:
        """Collective in this rank's team: everybody's tensors become the sums of all."""
        assert self._team is not None
        members, carrier = self._team

        def carry(piece: Piece) -> None:
            carrier.add_up_(piece, members[0])
            carrier.copy_(piece, members[0])

        return self._order(views, carry, times=2)

    def wait(self, order: Future[Any]) -> None:
        """Until it is carried out: nobody may touch its tensors before."""
        with self._ranks.waits():
            arrived = order.result()
        self._stream.wait(arrived)

    def close(self) -> None:
        """After the last order."""
        self._orders.put(None)
        self._thread.join()

    def _order(self, views: Sequence[torch.Tensor], carry: Callable[[Piece], None], *, times: int = 1) -> Future[Any]:
        ready = self._stream.computed()

        def work() -> Any:
            with self._stream.after(ready), self._ranks.counted(times * sum(view.nbytes for view in views)):
                for piece in cut(views, piece_bytes(self._device)):
                    carry(piece)
            return self._stream.arrived()

        order: Future[Any] = Future()
        self._orders.put((work, order))
        return order

    def _run(self) -> None:
        failure: BaseException | None = None
        while (order := self._orders.get()) is not None:
            work, result = order
            try:
                if failure is not None:  # the ranks are no longer at the same order
                    raise failure
                result.set_result(work())
            except BaseException as error:
                failure = error
                result.set_exception(error)


@contextmanager
def open_exchange(
    ranks: Ranks, node: Node, device: torch.device, teams: Sequence[Sequence[int]]
) -> Iterator[Exchange | None]:
    """Collective: between all ranks, and between those of every team; `None` for a single one."""
    if ranks.size == 1:
        yield None
        return
    everybody = open_carrier(ranks.rank, range(ranks.size), node, device)
    assert everybody is not None
    team = None
    for members in teams:
        own = open_carrier(ranks.rank, members, node, device) if len(members) > 1 else None
        team = (members, own) if own is not None else team
    exchange = Exchange(ranks, everybody, device, team)
    yield exchange
    exchange.close()  # not after an error: the others may be gone
