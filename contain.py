"""What a reader may skip: a checkpoint's programs, run where they can do no harm.

A chat template is a program, and so in effect is tokenizer.json (its regular expressions can run
for ever, a mistake in it can abort the process). Both may come from a stranger. So templates are
rendered, and tokenizers tried, in one child process, `python contain.py`, which limits its own
processor time and memory; the template runs in jinja2's sandbox there. If the child dies, one line
says so, and the next call starts another.
"""
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from datetime import datetime
from functools import lru_cache
from pathlib import Path

SECONDS = 5                          # of processor time a request
MEMORY = 512 * 2**20                 # bytes of address space, the interpreter included
BATCH = 256, 10**6                   # conversations, and characters in them, that go in one request
LONGEST = 10**7                      # characters that a template may write in reply to one
# What a tokenizer must survive before it is let in: scripts, blanks, long runs, half-open names.
TRIAL = ("Hello, wörld! 1234.5 <|x|> </s> 你好 \U0001f600\u2028\t\r\n  a" + "a" * 2000 + "! "
         + "1" * 2000 + " " * 2000 + "\n" * 200 + ".,;:-_#'+*~" * 50)
child = None


def render(template: str, conversations: list, variables: dict) -> list[str] | str:
    """The text of each conversation under a chat template; one string: what went wrong."""
    texts, waiting = [], list(conversations)
    while waiting:
        size, count = 0, 0
        while count < min(len(waiting), BATCH[0]) and (not count or size < BATCH[1]):
            size += sum(len(message["content"]) for message in waiting[count])
            count += 1
        reply = ask([template, waiting[:count], variables])
        if isinstance(reply, str):
            return reply
        texts += reply
        del waiting[:count]
    return texts


def try_tokenizer(file: Path) -> str | None:
    """What goes wrong with a tokenizer.json; None: nothing did."""
    reply = ask([str(file.resolve())])
    return reply if isinstance(reply, str) else None


def ask(request: list) -> list | str:
    """The child's reply: a list (see `answer`), or what went wrong."""
    global child
    if child is None or child.poll() is not None:
        # A session of its own: Ctrl-C is for us. It ends with us, when its input does. One thread:
        # with many cores, their stacks alone would fill the address space.
        child = subprocess.Popen(
            [sys.executable, __file__, str(SECONDS)], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"RAYON_NUM_THREADS": "1"})
    reply = ""
    try:
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        reply = child.stdout.readline()
    except BrokenPipeError:
        pass
    except BaseException:          # Ctrl-C: what it still says must not answer the next request
        child.kill()
        child.wait()
        raise
    if reply.endswith("\n"):
        return json.loads(reply)
    code, child = child.wait(), None
    return (f"took more than {SECONDS} s of processor time" if code == -signal.SIGPROF
            else f"broke down, or wanted more than {MEMORY >> 20} MB")


# ---------------------------------------------------------------- in the child

@lru_cache(maxsize=8)
def compiled(source: str):
    """A template in jinja2's sandbox, with the few functions that templates expect (as in
    transformers)."""
    from jinja2 import TemplateError  # comes with torch
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda x, **options: json.dumps(
        x, ensure_ascii=False, **options)
    # Prompts must not change by the day.
    environment.globals |= {"raise_exception": raise_exception, "date_string": "26 Jul 2024",
                            "strftime_now": datetime(2024, 7, 26).strftime}
    return environment.from_string(source)


def answer(request: list) -> list | str:
    """[template, conversations, variables] -> their texts; [path of a tokenizer.json] -> []."""
    if len(request) == 1:
        import tokenizers
        tokenizer = tokenizers.Tokenizer.from_file(*request)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for special in (True, False):
            tokenizer.encode_special_tokens = special
            tokenizer.decode(tokenizer.encode(TRIAL, add_special_tokens=False).ids)
        return []
    source, conversations, variables = request
    texts = []
    for messages in conversations:
        texts.append(compiled(source).render(variables | {"messages": messages}))
        if sum(map(len, texts)) > LONGEST:
            return f"wrote more than {LONGEST:,} characters"
    return texts


def serve(seconds: float):
    with contextlib.suppress(ValueError, OSError):           # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)        # then SIGPROF ends the process
        try:
            reply = json.dumps(answer(json.loads(line)))
        except MemoryError:
            reply = json.dumps(f"wanted more than {MEMORY >> 20} MB")
        except BaseException as error:    # whatever a program does; a panic in Rust is no Exception
            reply = json.dumps((str(error).strip() or type(error).__name__)[:300])
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
