"""Allocation of KV-cache pages: reserved up front, shared by prefix, evicted in LRU order.

::

    reserve(tokens, max_tokens) ──> Reservation: all pages that the request can need, the first of
                                    them already filled if its prefix is cached
    register_computed ──> a full page can be shared from now on
    release ──> cached pages are kept until their memory is needed, least recently used first

A cached page is identified by its tokens and all tokens before it, compared exactly: with hashes a
user could construct a collision and read another user's conversation. This module only manages page
numbers; the tensors are in runner.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

Key = tuple[int, tuple[int, ...]]
"""Node of the preceding page in the prefix tree, and the page's tokens."""
Namespace = tuple[str, str]
"""Name of an adapter and of an API key, or empty. Pages are shared only within a namespace: usage
tells how much was found in the cache, by which one client could guess another's prompts."""


@dataclass(slots=True)
class Reservation:
    """Pages of one request, in the order of its positions."""

    pages: list[int]
    cached_tokens: int
    """Positions whose keys and values were in the cache."""
    node: int
    """Node of the last registered page, or the root."""
    num_registered: int
    """Pages that register_computed has processed."""
    is_shared: bool


@dataclass(slots=True)
class PagePool:
    """All pages of one KV cache."""

    pages: int
    page_tokens: int
    share: bool = True
    _free: list[int] = field(default_factory=list)
    _unused: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Cached pages that no request uses, least recently used first."""
    _num_users: list[int] = field(default_factory=list)
    _cached: dict[Key, int] = field(default_factory=dict)
    _keys: dict[int, Key] = field(default_factory=dict)
    _nodes: dict[int, int] = field(default_factory=dict)
    """Page -> its node. Node numbers are never reused, so evicted prefixes cannot be found."""
    _roots: dict[Namespace, int] = field(default_factory=dict)
    _last_node: int = 0

    def __post_init__(self) -> None:
        self._free = list(range(self.pages - 1, -1, -1))
        self._num_users = [0] * self.pages

    @property
    def used(self) -> int:
        """Number of pages that requests have reserved."""
        return self.pages - len(self._free) - len(self._unused)

    def count_pages(self, tokens: int) -> int:
        """Return the number of pages for a number of tokens."""
        return -(-tokens // self.page_tokens)

    def reserve(
        self,
        tokens: Sequence[int],
        max_tokens: int,
        *,
        namespace: Namespace = ("", ""),
        share: bool = True,
    ) -> Reservation | None:
        """Reserve all pages of a request.

        Args:
            tokens: The request's current tokens, whose prefix is looked up.
            max_tokens: Max tokens of the request.
            namespace: Of its pages.
            share: Whether to look up the prefix.

        Returns:
            The pages; None if there are not enough now. The last token of `tokens` is never taken
            from the cache, because its logits are needed.
        """
        share = share and self.share
        found: list[int] = []
        node = self._get_root(namespace)
        if share:
            for start in range(0, len(tokens) - self.page_tokens, self.page_tokens):
                key = (node, tuple(tokens[start : start + self.page_tokens]))
                page = self._cached.get(key)
                if page is None:
                    break
                found.append(page)
                node = self._nodes[page]
        num_new = self.count_pages(max_tokens) - len(found)
        num_unused = sum(page in self._unused for page in found)
        if num_new > len(self._free) + len(self._unused) - num_unused:
            return None
        for page in found:
            self._unused.pop(page, None)
            self._num_users[page] += 1
        new = [self._take() for _ in range(num_new)]
        cached = len(found) * self.page_tokens
        return Reservation(
            pages=found + new,
            cached_tokens=cached,
            node=node,
            num_registered=len(found),
            is_shared=share,
        )

    def register_computed(
        self, reservation: Reservation, tokens: Sequence[int], num_computed: int
    ) -> None:
        """Make full pages available for sharing.

        Args:
            reservation: The request's pages.
            tokens: All tokens of the request.
            num_computed: Positions whose keys and values are in the pages.
        """
        if not reservation.is_shared:
            return
        while (reservation.num_registered + 1) * self.page_tokens <= num_computed:
            start = reservation.num_registered * self.page_tokens
            page = reservation.pages[reservation.num_registered]
            key = (reservation.node, tuple(tokens[start : start + self.page_tokens]))
            # If two requests compute the same page, the second one's copy is not shared.
            cached = self._cached.setdefault(key, page)
            if cached == page:
                self._keys[page] = key
                self._nodes[page] = self._make_node()
            reservation.node = self._nodes[cached]
            reservation.num_registered += 1

    def release(self, reservation: Reservation) -> None:
        """Release a request's pages.

        Args:
            reservation: The pages; not to be used any more.
        """
        # In reverse order, so that the end of a prefix is evicted before its beginning.
        for page in reversed(reservation.pages):
            self._num_users[page] -= 1
            if self._num_users[page]:
                continue
            if page in self._keys:
                self._unused[page] = None
            else:
                self._free.append(page)
        reservation.pages = []

    def forget(self, adapter: str | None = None) -> None:
        """Invalidate the prefix cache.

        Args:
            adapter: Invalidates only the namespaces of this adapter; None for all.
        """
        if adapter is not None:
            # They get new roots, from which the old pages cannot be reached.
            for namespace in [found for found in self._roots if found[0] == adapter]:
                del self._roots[namespace]
            return
        self._roots.clear()
        self._cached.clear()
        self._keys.clear()
        self._nodes.clear()
        self._free.extend(self._unused)
        self._unused.clear()

    def _take(self) -> int:
        """Take a free page, or evict a cached one."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            del self._cached[self._keys.pop(page)], self._nodes[page]
        self._num_users[page] = 1
        return page

    def _get_root(self, namespace: Namespace) -> int:
        if namespace not in self._roots:
            self._roots[namespace] = self._make_node()
        return self._roots[namespace]

    def _make_node(self) -> int:
        self._last_node += 1
        return self._last_node
