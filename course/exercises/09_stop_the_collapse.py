"""Exercise 9, 45 minutes: watch LSP-Zero degenerate, and stop it three times.

Read first: README.md (what LSP is), docs/MANUAL.md (the embedded world).

    python train.py --algo lsp-zero --seed 1

Watch the examples and "malformed" in the lines of the evaluations: after 15 to 30 steps the
Challenger asks for nothing that can be answered. Write three ways to stop it, each as a list of
train.py's flags (the check adds --seed 1), such as ["--algo", "lsp-zero", "--kl", "k3"]:

    by_alpha          the Challenger learns less than the Solver       --alpha-ch, below .75
    by_beta           both are held near the reference                 --beta, above .05
    by_self_reward    asking badly costs the Challenger something

The check plays each of them once, about a minute apiece, and wants at most 30 % of malformed
queries at the end; by alpha and by self-reward also carry accuracy above 70 %. Alpha has to be far
smaller than you would think (AdamW divides by the gradient's size: once the Solver has little left
to learn, what the Challenger adds moves the weights, however small it is). Then say of each way
what it cost: compare the classes of the queries ("challenger" in runs/exercise-1/eval.jsonl, ...)
with those at step 0. Does the Challenger still look for what the Solver cannot do?
"""
from short_game import play


def by_alpha():
    raise NotImplementedError("return flags of train.py, with a smaller --alpha-ch")


def by_beta():
    raise NotImplementedError("return flags of train.py, with a larger --beta")


def by_self_reward():
    raise NotImplementedError("return flags of train.py: another --algo")


# ---------------------------------------------------------------- the check

def check(by_alpha=by_alpha, by_beta=by_beta, by_self_reward=by_self_reward, play=play):
    ways = {"by_alpha": by_alpha, "by_beta": by_beta, "by_self_reward": by_self_reward}
    found, unwritten = [], []
    for way, function in ways.items():
        try:
            flags = function()
        except NotImplementedError as wanted:
            unwritten.append(f"{way}: {wanted}")
            continue
        assert isinstance(flags, list) and all(isinstance(flag, str) for flag in flags), (
            f"{way}: a list of flags is wanted, each a text, found {flags!r}")
        needed = {"by_alpha": "--alpha-ch", "by_beta": "--beta"}.get(way)
        assert not needed or "lsp-zero" in flags, f"{way}: without self-reward, --algo lsp-zero"
        assert not needed or needed in flags, f'{way}: with "{needed}", "its value"'
        last = play(*flags, again=False)
        asked, carry = last["challenger"], last["accuracy"]["carry"]
        assert asked["malformed"] <= 0.3, (
            f"{way}: {asked['malformed']:.0%} of the queries are malformed at the end: the game is "
            "still over, " + ("V_Q has to reach the Challenger" if way == "by_self_reward"
                              else f"go further with {flags}"))
        assert carry > 0.7 or way == "by_beta", (
            f"{way}: the queries are sound and carry accuracy ends at {carry:.2f}: this holds the "
            "Solver back as well, go less far")
        hard = asked["unit"] + asked["tens"] + asked["both"]
        found.append(f"{way}: carry accuracy {carry:.2f}, {hard:.2f} of the queries carry")
    if unwritten:
        raise NotImplementedError("; ".join([*(f"right, {way}" for way in found), *unwritten]))
    return "; ".join(found) + (
        " (at step 0: .02 and .19). Which Challenger still teaches? With --alpha-ch 0, where none "
        "plays, carry accuracy ends at .85. And whom does beta hold back?")
