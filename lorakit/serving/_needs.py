"""What a writer must know about the servers that a file is for: which ranks, alphas and contents they accept."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from lorakit.errors import UnsupportedModelError
from lorakit.serving._profiles import PROFILES, VLLM_RANKS, ServerProfile, profiles_of

# Ranks that every server in the table applies right; `rank="auto"` chooses among them.
SERVED_RANKS = VLLM_RANKS[1:]


@dataclass(frozen=True)
class Needs:
    """What several servers need together; of no server, nothing. With `among` only these ranks are written."""

    servers: tuple[ServerProfile, ...] = ()
    among: tuple[int, ...] | None = None

    @property
    def integer_alpha(self) -> bool:
        """Whether one of them needs an integer `lora_alpha`."""
        return any(server.integer_alpha for server in self.servers)

    def takes(self, rank: int) -> bool:
        """Whether all of them apply an update of this rank right."""
        return (self.among is None or rank in self.among) and all(server.takes(rank) for server in self.servers)

    def rank_at_least(self, rank: int) -> int:
        """The smallest rank from `rank` on that all of them take. Raises: UnsupportedModelError where there is none."""
        found = next((larger for larger in range(rank, max(rank + 16, 513)) if self.takes(larger)), None)
        if found is None:
            raise UnsupportedModelError(
                f"No rank that is served everywhere ({', '.join(map(str, self.among or ()))}) is as large as {rank}. "
                f"Ask for a lower rank or less energy."
            )
        return found

    def check(self, contents: Collection[str]) -> None:
        """Raise UnsupportedModelError, naming the server, where one refuses some of an adapter's contents."""
        for server in self.servers:
            refused = [content for content in server.refuses if content in contents]
            if refused:
                raise UnsupportedModelError(
                    f"{server.name} does not serve adapters with {' and '.join(refused)}, which this one has "
                    f"({server.source}). Merge the adapter into the model for it, or leave {server.name} out."
                )

    def check_rank(self, rank: int) -> None:
        """Raise UnsupportedModelError, naming the server, where one cannot serve this rank."""
        for server in self.servers:
            if server.max_rank is not None and rank > server.max_rank:
                raise UnsupportedModelError(
                    f"{server.name} serves ranks up to {server.max_rank}; the adapter would have rank {rank}. Ask for "
                    f"a lower rank."
                )


def needs_of(for_server: str | Iterable[str] | None, *, pad: bool = True) -> Needs:
    """What the servers named need together; several in one string have commas between.

    Raises: ValueError for an unknown name, and where a server that needs one rank is asked for with `pad=False`;
    UnsupportedModelError for a server that reads no PEFT directory.

    Example:
        >>> needs_of("lorax,ollama").rank_at_least(13)
        16
    """
    try:
        servers = profiles_of(for_server)
    except ValueError:
        raise ValueError(f"`for_server` must be among {', '.join(PROFILES)}; got {for_server!r}.") from None
    for server in servers:
        if server.own_format is not None:
            raise UnsupportedModelError(
                f"{server.name} reads no PEFT directory: it needs a file of its own, in the format {server.own_format}."
            )
        if server.one_rank and not pad:
            raise ValueError(
                f"`for_server` has {server.name}, which needs one rank for all modules; leave out `pad=False` "
                f"(--compact) and `per_module`."
            )
    return Needs(servers)
