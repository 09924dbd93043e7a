"""Mutations of what searches among weights and coefficients promise: the same bits, the formulas, the history."""

from __future__ import annotations

from checks.mutation_list.mutation import in_file

EVOLVE = ("tests/evolve/test_evolve.py",)
SCHEDULES = ("tests/evolve/test_schedules.py",)
SEARCH = ("tests/evolve/test_search.py",)
COMMAND = tuple(
    f"tests/evolve/test_command.py::test_a_{name}"
    for name in (
        "directory_is_one_runs_alone_and_done_with_when_its_model_is_there",
        "module_of_another_dtype_does_not_show_in_the_files",
    )
)
FOLDER = "fastmerge/evolve/"

MUTATIONS = [
    *in_file(
        f"{FOLDER}population.py",
        EVOLVE,
        ("pieces know where they lie", "offset=start,", "offset=0,"),
        ("integers are the member's own", "source = leaves[node] if", "source = self._held[0] if"),
        ("models in memory are not changed", "if not self._own[member]:", "if False:"),
        ("a value is kept while it is needed", "if last[parent] == node and", "if True and"),
        ("models of files are kept", "self.kept = kept or members.owned", "self.kept = kept"),
        (
            "one trial is mixed in its place",
            "if len(order) == 1:\n            # The usual",
            "if order:\n            # The usual",
        ),
        ("half of what is free is left", "members.nbytes <= free // 2", "members.nbytes <= free"),
    ),
    *in_file(
        f"{FOLDER}recipes.py",
        EVOLVE,
        ("each pair has its factor", "zip(self.factors[1:], further", "zip(self.factors[:-1], further"),
        ("the forced element is in one tensor", "self.forced[0] == name else None", "True else None"),
        ("a node comes after its parents", "return sorted(wanted)", "return sorted(wanted, reverse=True)"),
    ),
    *in_file(
        f"{FOLDER}members.py",
        EVOLVE,
        ("a tied head does not evolve beside its embedding", "            and name not in aliases\n", ""),
        ("all members have one dtype", "other.tensors[name].dtype != info.dtype", "False"),
        ("elements are counted by name", "for name in sorted(self.evolved):", "for name in self.evolved:"),
        ("ties follow names", "in sorted(set(source.tensors) - set(found))", "in sorted(source.tensors, reverse=True)"),
        ("a digest is of the members' dtype", "raw_bytes(in_dtype(tensors[name], info))", "raw_bytes(tensors[name])"),
    ),
    *in_file(
        f"{FOLDER}live.py",
        EVOLVE,
        ("a module may not be a member's memory", "if tensor.data_ptr() in inputs:", "if False:"),
    ),
    *in_file(
        f"{FOLDER}evolution.py",
        EVOLVE,
        ("better is strictly better", "score > self.scores[at] or (", "score >= self.scores[at] or ("),
        ("as good replaces where the strategy says so", "self.strategy.equal_replaces and score", "False and score"),
        (
            "the chosen model is shown after its final score",
            "        # Whatever it has done to the live tensors.\n        self._show_best()\n",
            "",
        ),
        (
            "the trial is merged in its member's place",
            "and number == member else values",
            "and number == 0 else values",
        ),
    ),
    *in_file(
        f"{FOLDER}history.py",
        EVOLVE,
        ("failures at the end are tried again", 'while found and found[-1].get("error"):', "while False:"),
        ("a torn line is dropped", 'length = content.rfind(b"\\n") + 1', "length = len(content)"),
        ("a history of another run is refused", "        if then != now:", "        if False:"),
        ("a line must be what the run does there", "if any(record.get(key, _MISSING) != value for", "if any(False for"),
    ),
    *in_file(
        f"{FOLDER}history.py",
        EVOLVE,
        ("a history is one run's", "        hold(self._file.fileno(), self.path.parent)\n", ""),
    ),
    *in_file(
        f"{FOLDER}lock.py",
        COMMAND,
        ("who comes second is told", "if error.errno in _TAKEN:", "if False:"),
    ),
    *in_file(
        f"{FOLDER}job.py",
        COMMAND,
        ("a directory is one run's", "    with Occupied(out):\n", "    if True:\n"),
        ("what is written has the members' dtype", "evolved = isinstance(report, EvolveReport)", "evolved = False"),
    ),
    *in_file(
        f"{FOLDER}evaluator.py",
        EVOLVE,
        (
            "a success ends a row of failures",
            "            self._in_a_row = 0\n            return",
            "            return",
        ),
        ("one function is not both scores", "if last.function == development.function:", "if False:"),
        ("NaN is no score", "if not math.isfinite(score):", "if False:"),
    ),
    *in_file(
        f"{FOLDER}strategies.py",
        SCHEDULES,
        ("Evolver's best is another one", "_best(scores, others)", "_best(scores, range(members))"),
        ("CADE's three are different", '"de", member, (c, a, b)', '"de", member, (a, a, b)'),
        ("current-to-best begins at x", "(member, best, member, *drawn)", "(drawn[0], best, member, *drawn)"),
        ("without crossover no rate is learned", "trial.crossover if trial.forced else None", "trial.crossover"),
        ("current-to-rand crosses nothing over", "(pull, scale), 1.0, False", "(pull, scale), crossover, False"),
    ),
    *in_file(
        f"{FOLDER}schedules.py",
        SCHEDULES,
        ("after its period the cosine stays down", "min(step, period)", "step"),
        ("the cosine is halved", "math.pi * at / period)) / 2.0", "math.pi * at / period))"),
        ("SaDE waits until its window is full", "if len(self._tallies) >= self.window:", "if self._tallies:"),
        ("what has left the window is forgotten", "while len(self._tallies) > self.window:", "while False:"),
        ("no variant dies out", "else 0.0) + 0.01", "else 0.0)"),
    ),
    *in_file(
        f"{FOLDER}draws.py",
        SCHEDULES,
        ("a generation draws for itself", "{seed} {generation} {member}", "{seed} {member}"),
        ("a member draws for itself", "{seed} {generation} {member}", "{seed} {generation}"),
        ("a seed draws for itself", "{seed} {generation} {member}", "{generation} {member}"),
    ),
    *in_file(
        f"{FOLDER}coefficients.py",
        SEARCH,
        ("a failed point is the worst", "self.worst if score is None else score", "0.0 if score is None else score"),
        ("before any score nothing is told", "self.worst = math.inf", "self.worst = 0.0"),
        ("both ends are checked first", "for end in (0.0, 1.0):", "for end in (0.0,):"),
        ("a range begins at its lowest", "axis.low + (axis.high - axis.low)", "(axis.high - axis.low)"),
    ),
]
