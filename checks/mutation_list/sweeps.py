"""Mutations of what several merges of the same models promise: the bits of each, and what is found once."""

from __future__ import annotations

from checks.mutation_list.mutation import in_file

MANY = ("tests/engine/test_merge_many.py",)
LOADING = ("tests/engine/test_loading.py",)
SWEEP = ("tests/sweep/test_sweep.py",)

MUTATIONS = [
    *in_file(
        "fastmerge/engine/shared.py",
        MANY,
        ("inputs are told apart", "return (job.match.base is not None, compute, *read, *job.held)", "return (True,)"),
        ("what is found is kept", "        if key not in states:\n", "        if True:\n"),
        (
            "what others need is found on the way",
            "statistic.observe_with(list(also.values()),",
            "statistic.observe_with([],",
        ),
        ("each has its own state", "zip([key, *also], found", "zip([key, *reversed(also)], found"),
        (
            "statistics of whole models are kept",
            "                self._of_models.append((*about, value))",
            "                pass",
        ),
        ("and told by what they depend on", "_plain(statistic.depends_on())):\n", "depends):\n"),
    ),
    *in_file(
        "fastmerge/methods/statistics.py",
        MANY,
        ("bounds are those of the ranks", "return tuple(self.ranks.first), tuple(self.ranks.last)", "return ()"),
        (
            "a pair of ranks is counted once",
            "dict.fromkeys(pair for pairs in wanted for pair in pairs)",
            "[pair for pairs in wanted for pair in pairs]",
        ),
        (
            "rows go to their models",
            "bounds[mine].contiguous(), ties[mine]",
            "bounds[mine].flip(0).contiguous(), ties[mine]",
        ),
        ("sums are those of what is kept", "        return self.kept_by\n", "        return ()\n"),
    ),
    *in_file(
        "fastmerge/methods/consensus.py",
        MANY,
        (
            "what is kept follows from the density",
            "return self.sparsify, parameters.density, *more,",
            "return self.sparsify, *more,",
        ),
        ("and from the outliers", '("gamma", "epsilon", "scope")]', '("epsilon", "scope")]'),
        ("and from the spread of chances", '("gamma", "epsilon", "scope")]', '("gamma", "scope")]'),
    ),
    *in_file(
        "fastmerge/methods/ram.py",
        MANY,
        ("counts depend on epsilon", "        return parameters.epsilon\n", "        return ()\n"),
    ),
    *in_file(
        "fastmerge/methods/pcb_statistics.py",
        MANY,
        ("rules depend on the density", "return self.variant, tuple(self.density)", "return self.variant"),
        ("and on the variant", "return self.variant, tuple(self.density)", "return tuple(self.density)"),
    ),
    *in_file(
        "fastmerge/engine/nonfinite.py",
        MANY,
        (
            "what holds NaN is not clean",
            "            if name not in self.counts.get(one.source.ref, {}):\n",
            "            if True:\n",
        ),
        (
            "what is clean is not counted again",
            "or (one.source.ref, one.info.name, piece.dtype) in self._clean",
            "or False",
        ),
    ),
    *in_file(
        "fastmerge/engine/loading.py",
        LOADING,
        ("parts follow each other", "view[where + start : where", "view[where : where"),
        ("tensors follow each other", "        offset += aligned(info.nbytes)\n", "        offset += info.nbytes\n"),
        ("what a read says is heard", "                read.result()\n", "                pass\n"),
        ("ties are as the checkpoint says", "        return self._tied\n", "        return None\n"),
    ),
    *in_file(
        "fastmerge/engine/sinks.py",
        MANY,
        ("memory is used again", "old = None if again is None else again.get(job.name)", "old = None"),
    ),
    *in_file(
        "fastmerge/merging_in_memory.py",
        MANY,
        ("memory is used again where that is asked for", "        if self._reuse:\n", "        if True:\n"),
        ("a candidate goes before what all share", "{**parameters, **one}.items()", "{**one, **parameters}.items()"),
    ),
    *in_file(
        "fastmerge/sweep/config.py",
        SWEEP,
        ("a value goes before that of a model", 'entry["parameters"].pop(name, None)', "pass"),
        (
            "values per model go to their models",
            "strict=True):\n                index = entry.path[1]",
            "strict=True):\n                index = 0",
        ),
        ("what is told is told of the sweep's line", "            lines[here] = found\n", "            pass\n"),
        ("a candidate comes once", "            if first != number:\n", "            if False:\n"),
        ("the method is the candidate's", 'plain["merge_method"] = candidate[METHOD]', "pass"),
    ),
    *in_file(
        "fastmerge/sweep/job.py",
        SWEEP,
        (
            "the best is the highest",
            'return float("-inf") if score is None else score',
            'return float("inf") if score is None else -score',
        ),
        (
            "a failed merge is a failed candidate",
            "        except MergeError as failed:\n",
            "        except KeyError as failed:\n",
        ),
        (
            "failures in a row are counted",
            "        self.development.count(error,",
            "        self.development.count(error and '',",
        ),
        (
            "settings are part of what a file is of",
            '            "candidates": config.candidates,\n            "score"',
            '            "score"',
        ),
        (
            "the final score is of the best",
            "self.final.measure_once(self._subject(self.best))",
            "self.final.measure_once(self._subject(0))",
        ),
        ("lists are for values per model", "if isinstance(value, list) and not known[name].per_model:", "if False:"),
    ),
    *in_file(
        "fastmerge/sweep/picture.py",
        SWEEP,
        ("numbers lie where they belong", "float(value) if numbers else float(place)", "float(place)"),
        ("the best of each value", "best = [(v, max(s for", "best = [(v, min(s for"),
    ),
]
