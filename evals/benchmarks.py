"""Benchmarks with a right answer: problems, their zero-shot prompts, and who says what is right.

gsm8k and tiny by exact match of numbers, math by the values of what is boxed (math-verify),
humaneval and mbpp by running their tests (grade.py).
"""
from evals import grade
from plumbing.chat import fill
from plumbing.data import query_of, read_entries
from plumbing.files import HERE, InputError, read_prompt
from rewards import boxed, exact, final_number, same_value
from tiny import world as tiny_world

# Fields that a problem must have, and new tokens for an answer.
FIELDS = {
    "alpaca_eval": ("instruction",),               # nothing is right there: eval.py generate
    "outputs": ("instruction", "output"),          # what it writes: eval.py winrate
    "gsm8k": ("question", "answer"),
    "math": ("problem", "answer"),                 # or a solution that boxes the answer
    "humaneval": ("prompt", "test", "entry_point"),
    "mbpp": ("prompt", "code", "test_list"),       # the full data set: text
}
TOKENS = {"gsm8k": 512, "math": 1024, "humaneval": 768, "mbpp": 768, "tiny": 5}
CODE = ("humaneval", "mbpp")


def read_problems(name: str, path: str | None, limit: int | None) -> tuple[list[dict], str | None]:
    """A benchmark's problems, each with query (what the model is asked), gold, subset and the
    problem itself; and the prompt that was filled (None in the embedded world, which has none)."""
    if name == "tiny":
        queries = tiny_world.held_out_queries()[:limit]
        return [{"query": q, "gold": str(sum(tiny_world.parse_query(q))),
                 "subset": tiny_world.classify(q), "problem": None} for q in queries], None
    if path is None:
        raise InputError(f"{name} needs --prompts FILE (docs/MANUAL.md says where it comes from)")
    bare = name in ("alpaca_eval", "outputs")
    prompt = "{problem}" if bare else read_prompt(HERE / "prompts" / f"{name}.txt")
    problems = []
    for where, entry in read_entries(path)[:limit]:
        entry = entry if isinstance(entry, dict) else {}
        if name == "mbpp":
            entry = {"prompt": entry.get("text")} | entry
        if name == "math" and isinstance(entry.get("solution"), str):
            entry = {"answer": boxed(entry["solution"]), "subject": entry.get("type")} | entry
        missing = [key for key in FIELDS[name]
                   if not isinstance(entry.get(key), list if key == "test_list" else str)]
        if missing:
            raise InputError(f"{path}, {where}: no text in {', '.join(missing)} ({name})")
        if name == "gsm8k" and final_number(entry["answer"]) is None:
            raise InputError(f"{path}, {where}: no number in answer ({name})")
        query = fill(prompt, problem=query_of(entry, FIELDS[name][0]),
                     tests="\n".join(entry.get("test_list", [])))
        problems.append({"query": query, "gold": entry.get("answer"), "problem": entry,
                         "subset": entry.get("subject")})
    if not problems:
        raise InputError(f"{path}: nothing in it")
    return problems, prompt


def is_right(name: str, problem: dict, answer: str, *, cut: bool) -> tuple[bool, str]:
    """Whether an answer is right, and a word on why. cut: the token limit ended the answer.

    A number that was cut off is no answer ("#### 4" may be half of 42). What came before the cut
    may hold a whole \\boxed{} or a whole program, and that counts.
    """
    if name in ("gsm8k", "tiny") and cut:
        return False, "cut off"
    if name == "tiny":
        right = tiny_world.correct(problem["query"], answer)
    elif name == "gsm8k":
        right = bool(exact([""], [answer], [problem["gold"]]))
    elif name == "math":
        said = boxed(answer)
        if said is None:
            return False, "nothing boxed"
        right = same_value(said, problem["gold"])
    else:
        program = getattr(grade, f"{name}_program")(problem["problem"], answer)
        right, why = grade.run_program(program)
        if why == "sandbox":                        # a fault of this machine, not of the answer
            raise InputError("a program could not be started in its containment; the same command "
                             "goes on from here")
        return right, why
    return right, "equal" if right else "not equal"


def run_references(file: str):
    """Run a file's reference solutions: where they pass, the sandbox is no hindrance to answers."""
    print(grade.ISOLATION[grade.containment()])
    humaneval = any("entry_point" in str(entry) for _, entry in read_entries(file))
    name, solution = ("humaneval", "canonical_solution") if humaneval else ("mbpp", "code")
    problems, passed = read_problems(name, file, None)[0], 0
    for problem in problems:
        right, reason = is_right(name, problem, problem["problem"].get(solution, ""), cut=False)
        passed += right
        if not right:
            print(f"{problem['problem']['task_id']}: {reason}")
    print(f"{passed} of {len(problems)} reference solutions pass")


def scores(records: list[dict], samples: int) -> dict[str, list[float]]:
    """{"accuracy": a value an item}; with several samples pass@1, pass@5, ..., unbiased."""
    if samples == 1:
        return {"accuracy": [float(record["correct"][0]) for record in records]}
    return {f"pass@{k}": [grade.pass_at_k(samples, sum(record["correct"]), k) for record in records]
            for k in sorted({k for k in (1, 5, 10, 100) if k <= samples} | {samples})}
