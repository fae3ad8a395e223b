"""Which page of the cache holds whose tokens: reserved ahead, shared by prefix, reused when full.

::

    reserve(tokens, room) ──> Reservation: pages for all that the request may ever need, the first
                              of them with contents already where its beginning is known
    note_computed ──> a full page may be shared from now on
    release ──> pages that are known stay until somebody needs the room, longest unused first

A page is known by its tokens and by all tokens before it, compared exactly: a hash could be made to
collide, and one user would read another's conversation. Numbers only; the tensors are elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

Key = tuple[int, tuple[int, ...]]
"""Node of what comes before, and the page's own tokens."""


@dataclass(slots=True)
class Reservation:
    """Pages of one request, in the order of its positions."""

    pages: list[int]
    cached_tokens: int
    """Positions whose keys and values are there already."""
    node: int
    """Of the last page that is known, or of the root."""
    noted: int
    """Pages that have been looked at by note_computed."""
    shares: bool


@dataclass(slots=True)
class PagePool:
    """All pages of one cache."""

    pages: int
    page_tokens: int
    share: bool = True
    queries: int = 0
    """Prompt tokens that were looked up."""
    hits: int = 0
    """Those of them that were found."""
    _empty: list[int] = field(default_factory=list)
    _idle: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Known pages that nobody uses, longest unused first."""
    _users: list[int] = field(default_factory=list)
    _known: dict[Key, int] = field(default_factory=dict)
    _keys: dict[int, Key] = field(default_factory=dict)
    _nodes: dict[int, int] = field(default_factory=dict)
    """Page -> its node; a number is never used twice, so that nothing hangs on a page's past."""
    _roots: dict[str, int] = field(default_factory=dict)
    _last_node: int = 0

    def __post_init__(self) -> None:
        self._empty = list(range(self.pages - 1, -1, -1))
        self._users = [0] * self.pages

    @property
    def used(self) -> int:
        """Pages that somebody has reserved."""
        return self.pages - len(self._empty) - len(self._idle)

    def count_pages(self, tokens: int) -> int:
        """Give the pages that so many tokens fill."""
        return -(-tokens // self.page_tokens)

    def reserve(
        self, tokens: Sequence[int], room: int, *, family: str = "", share: bool = True
    ) -> Reservation | None:
        """Reserve pages for a request as a whole.

        Args:
            tokens: Those that are known; looked up.
            room: Tokens that it may have in the end.
            family: Only pages of the same one are shared: the adapter.
            share: Whether to look at all.

        Returns:
            The pages; None where there is no room now. At least the last token of `tokens` is never
            taken from the cache, because somebody wants its logits.
        """
        share = share and self.share
        found: list[int] = []
        node = self._root(family)
        if share:
            for start in range(0, len(tokens) - self.page_tokens, self.page_tokens):
                key = (node, tuple(tokens[start : start + self.page_tokens]))
                page = self._known.get(key)
                if page is None:
                    break
                found.append(page)
                node = self._nodes[page]
        fresh = self.count_pages(room) - len(found)
        idle = sum(page in self._idle for page in found)
        if fresh > len(self._empty) + len(self._idle) - idle:
            return None
        for page in found:
            self._idle.pop(page, None)
            self._users[page] += 1
        taken = [self._take() for _ in range(fresh)]
        cached = len(found) * self.page_tokens
        if share:
            self.queries += len(tokens)
            self.hits += cached
        return Reservation(
            pages=found + taken, cached_tokens=cached, node=node, noted=len(found), shares=share
        )

    def note_computed(self, reservation: Reservation, tokens: Sequence[int], computed: int) -> None:
        """Make full pages known.

        Args:
            reservation: Of the request.
            tokens: All of the request's.
            computed: Positions whose keys and values are in the pages.
        """
        if not reservation.shares:
            return
        while (reservation.noted + 1) * self.page_tokens <= computed:
            start = reservation.noted * self.page_tokens
            page = reservation.pages[reservation.noted]
            key = (reservation.node, tuple(tokens[start : start + self.page_tokens]))
            # Two may compute the same at the same time; the second keeps its copy to itself.
            holder = self._known.setdefault(key, page)
            if holder == page:
                self._keys[page] = key
                self._nodes[page] = self._new_node()
            reservation.node = self._nodes[holder]
            reservation.noted += 1

    def release(self, reservation: Reservation) -> None:
        """Give pages back.

        Args:
            reservation: Not to be used any more.
        """
        # Backwards: the end of a text goes before its beginning.
        for page in reversed(reservation.pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._keys:
                self._idle[page] = None
            else:
                self._empty.append(page)
        reservation.pages = []

    def forget(self, family: str | None = None) -> None:
        """Share nothing of what was computed until now.

        Args:
            family: Only of this one; None: of all.
        """
        if family is not None:
            # Its root gets another number; what hung on the old one is never found again.
            self._roots.pop(family, None)
            return
        self._roots.clear()
        self._known.clear()
        self._keys.clear()
        self._nodes.clear()
        self._empty.extend(self._idle)
        self._idle.clear()

    def _take(self) -> int:
        if self._empty:
            page = self._empty.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._keys.pop(page)], self._nodes[page]
        self._users[page] = 1
        return page

    def _root(self, family: str) -> int:
        if family not in self._roots:
            self._roots[family] = self._new_node()
        return self._roots[family]

    def _new_node(self) -> int:
        self._last_node += 1
        return self._last_node
