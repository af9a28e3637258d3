"""The page's section on experts. It has figures only where a sentence or a table is not enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

from vraxion_ckpt.reporting.colours import expert_colour
from vraxion_ckpt.reporting.drawing import KeyEntry
from vraxion_ckpt.reporting.figures import Drawn, norm_figure, similarity_figure
from vraxion_ckpt.reporting.gather import Subject
from vraxion_ckpt.reporting.similarity import Similarity
from vraxion_ckpt.wording import count, listed, numbered

_MOST_ROWS = 12
# The norms of at most this many experts are shown in a table.
_FEW = 8
# Norms are given in one sentence if their relative difference is at most this.
_NEAR = 0.01
_NOT_A_NUMBER = "not a number"


@dataclass(frozen=True)
class ExpertsSection:
    """The section on experts.

    Attributes:
        figures: the matrix of cosines and the bars of norms, each only if it is needed.
        norms: a legend entry and a norm for each expert; empty if a figure or a sentence shows the norms.
        copies: rows of the table of copies: the experts, the expert that they are copies of, what differs.
        more_copies: the number of rows omitted from `copies`.
        sentences: the facts that need neither a figure nor a table.
    """

    figures: Sequence[Drawn]
    norms: Sequence[tuple[KeyEntry, str]]
    copies: Sequence[tuple[str, str, str]]
    more_copies: int
    sentences: Sequence[str]


def experts_section(subject: Subject) -> ExpertsSection | None:
    """Return the section on experts, or None if no expert has tensors."""
    similarity = subject.similarity
    if similarity is None:
        return None
    figures, sentences, norms = [], [], []
    if len(similarity.groups) > 2:
        caption = _about_cosines(subject, similarity)
        figures.append(Drawn("similarity", similarity_figure(similarity), "Similarity", caption))
    sentences += _about_pair(similarity) + _about_copies(subject, similarity)
    about_norms = _norms_in_a_sentence(similarity)
    if about_norms:
        sentences.append(about_norms)
    elif len(similarity.ids) <= _FEW:
        norms = [
            (KeyEntry(expert_colour(i), str(i), ""), f"{norm:.6g}" if isfinite(norm) else _NOT_A_NUMBER)
            for i, norm in zip(similarity.ids, similarity.norms.tolist(), strict=True)
        ]
    else:
        figures.append(Drawn("norms", norm_figure(similarity), "Norms", _range_of_norms(subject, similarity)))
    sentences += _about_odd_norms(similarity)
    if subject.deleted:
        sentences.append(f"Deleted, without tensors: {numbered('expert', sorted(subject.deleted))}.")
    copies = [] if _all_identical(similarity) else list(_copy_rows(similarity))
    return ExpertsSection(figures, norms, copies[:_MOST_ROWS], max(0, len(copies) - _MOST_ROWS), sentences)


# --- cosines ---


def _about_cosines(subject: Subject, similarity: Similarity) -> str:
    groups, cosines = similarity.groups, similarity.cosines.tolist()
    pairs = [(cosines[a][b], a, b) for a in range(len(groups)) for b in range(a + 1, len(groups))]
    sentences = [f"Cosines between {_scope(subject, similarity)}"]
    known = [pair for pair in pairs if isfinite(pair[0])]
    if known:
        value, a, b = max(known)
        sentences.append(f"The most similar are experts {groups[a].first} and {groups[b].first}: {value:.4f}")
    if any(group.copies for group in groups):
        sentences.append("Copies share a row and a column")
    if len(known) < len(pairs):
        sentences.append("A gap means that shapes differ, a norm is not a number, or all entries are zero")
    return ". ".join(sentences) + "."


def _about_pair(similarity: Similarity) -> list[str]:
    """Return the cosine as a sentence if there are exactly two groups of copies, else an empty list."""
    if len(similarity.groups) != 2:
        return []
    cosine = float(similarity.cosines[0, 1])
    number = f"{cosine:.4f}" if isfinite(cosine) else "not defined"
    first, second = (numbered("expert", group.ids) for group in similarity.groups)
    return [f"The cosine between {first} and {second} is {number}."]


# --- copies ---


def _all_identical(similarity: Similarity) -> bool:
    return len(similarity.groups) == 1 and not any(copy.leaves for copy in similarity.groups[0].copies)


def _about_copies(subject: Subject, similarity: Similarity) -> list[str]:
    number = len(similarity.ids)
    if number == 1 or not _all_identical(similarity):
        return []
    all_ = "Both" if number == 2 else f"All {number:,}"
    which = f"{all_} experts" if number == _present(subject) else f"The {number} experts that were compared"
    return [f"{which} are bit-identical: no parameter differs."]


def _copy_rows(similarity: Similarity) -> Iterator[tuple[str, str, str]]:
    for group in similarity.groups:
        identical = [copy.expert for copy in group.copies if not copy.leaves]
        if identical:
            yield listed(identical), str(group.first), "nothing: bit-identical"
        for copy in group.copies:
            if copy.leaves:
                yield str(copy.expert), str(group.first), f"{listed(copy.leaves)}: {copy.measure}"


# --- norms ---


def _norms_in_a_sentence(similarity: Similarity) -> str:
    """Return the norms as a sentence if they are nearly equal, else an empty text."""
    norms = similarity.norms.tolist()
    if len(norms) == 1 and isfinite(norms[0]):
        return f"The norm of expert {similarity.ids[0]} is {norms[0]:.6g}."
    if not all(map(isfinite, norms)) or max(norms) - min(norms) > _NEAR * max(norms):
        return ""
    low, high = (f"{norm:.6g}" for norm in (min(norms), max(norms)))
    which = f"The norms of {count(len(norms), 'expert')}"
    return f"{which} are equal: {low}." if low == high else f"{which} are nearly equal: {low} to {high}."


def _range_of_norms(subject: Subject, similarity: Similarity) -> str:
    finite = [(norm, i) for i, norm in zip(similarity.ids, similarity.norms.tolist(), strict=True) if isfinite(norm)]
    caption = f"Norms of {_scope(subject, similarity)}"
    if not finite:
        return f"{caption}."
    (low, least), (high, most) = min(finite), max(finite)
    return f"{caption}, from {low:.4g} (expert {least}) to {high:.4g} (expert {most})."


def _about_odd_norms(similarity: Similarity) -> list[str]:
    odd = [i for i, norm in zip(similarity.ids, similarity.norms.tolist(), strict=True) if not isfinite(norm)]
    reason = "an entry is not finite, has no numeric value, or is too large to be squared"
    return [f"Norm {_NOT_A_NUMBER}: {numbered('expert', odd)}, because {reason}."] if odd else []


# --- names ---


def _scope(subject: Subject, similarity: Similarity) -> str:
    compared, present = len(similarity.ids), _present(subject)
    if compared < present:
        return f"{compared} of {present:,} experts (those of the split, and those with the largest shares)"
    return count(present, "expert")


def _present(subject: Subject) -> int:
    return subject.num_experts - len(subject.deleted)
