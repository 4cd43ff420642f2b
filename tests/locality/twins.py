"""Slow twins, written from the definitions with Python sets and loops, sharing no idea with the kernels."""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def document_tokens(trace, layer):
    """For each document the list of tokens, each the list of experts of one MoE layer (or of all, as pairs)."""
    documents = []
    for number in dict.fromkeys(trace.document.tolist()):
        tokens = []
        for row in np.flatnonzero(trace.document == number):
            layers = range(trace.num_moe_layers) if layer is None else [layer]
            token = [(at, int(e)) for at in layers for e in trace.expert_ids[row, at] if e >= 0]
            tokens.append(token)
        documents.append(tokens)
    return documents


def all_experts(trace, layer):
    layers = range(trace.num_moe_layers) if layer is None else [layer]
    return [(at, e) for at in layers for e in range(trace.num_experts)]


def srp_by_search(trace, segment, experts):
    """Best F1 over thresholds, its relative size and threshold, by trying all of them on all windows."""
    uses = []
    for at, expert in experts:
        for tokens in document_tokens(trace, at):
            on = [(at, expert) in token for token in tokens]
            uses += [sum(on[start : start + segment]) for start in range(len(on) - segment + 1)]
    active = sum(uses)
    best = (Fraction(0), Fraction(0), 0)
    for threshold in range(segment + 1):
        kept = [f for f in uses if f >= threshold]
        pairs = segment * len(kept)
        f1 = Fraction(2 * sum(kept), pairs + active) if pairs + active else Fraction(0)
        if f1 > best[0]:
            best = (f1, Fraction(pairs, active), threshold)
    return best


def static_by_sorting(trace, segment, capacity, layer):
    """Uses of the C most used experts of each window, over all uses of the windows."""
    kept = total = 0
    for tokens in document_tokens(trace, layer):
        for start in range(len(tokens) - segment + 1):
            counts = {}
            for token in tokens[start : start + segment]:
                for expert in token:
                    counts[expert] = counts.get(expert, 0) + 1
            kept += sum(sorted(counts.values(), reverse=True)[:capacity])
            total += sum(counts.values())
    return kept / total if total else float("nan")


def simulate(trace, capacity, layer, rule, *, segment=1, cold="free", requests="snapshot", kept=False):
    """One cache of one size, a set with explicit victims. ``rule`` is lookahead, lru, lfu or belady."""
    documents = document_tokens(trace, layer)
    if kept:
        documents = [[token for tokens in documents for token in tokens]]
    if requests == "token" and layer is None:
        layers = range(trace.num_moe_layers)
        documents = [[[x for x in token if x[0] == at] for token in tokens for at in layers] for tokens in documents]
    hits = total = 0
    for tokens in documents:
        cache, seen, used, last = set(), set(), {}, {}
        for i, token in enumerate(tokens):
            before = set(cache)
            if requests == "token":
                touch(token, used, last)
            for j, x in enumerate(token):
                resident = x in (cache if requests == "single" else before)
                hits += resident or (x not in seen and len(seen) < capacity and cold == "free")
                total += 1
                seen.add(x)
                if x not in cache and len(cache) == capacity:
                    future = token[j + 1 :], tokens[i + 1 : i + segment], tokens[i + 1 :]
                    pinned = token if requests == "token" else []
                    cache.remove(min((y for y in cache if y not in pinned), key=lambda y: worth(y, rule, future, used, last)))
                cache.add(x)
                if requests != "token":
                    touch([x], used, last)
    return hits / total if total else float("nan")


def touch(experts, used, last):
    for x in experts:
        used[x] = used.get(x, 0) + 1
        last[x] = max(last.values(), default=0) + 1


def worth(y, rule, future, used, last):
    pending, window, rest = future
    if rule == "lookahead":
        return pending.count(y) + sum(token.count(y) for token in window), last[y]
    if rule == "lru":
        return (last[y],)
    if rule == "lfu":
        return used[y], last[y]
    coming = pending + [x for token in rest for x in token]
    return (-coming.index(y) if y in coming else -len(coming),)
