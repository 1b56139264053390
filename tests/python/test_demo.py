"""The demo as a program, both its processes, with a tiny random model in place of the real one."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from tiny import llama, transformers

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")


def saved_model(folder):
    """A model with a vocabulary of characters, saved as a folder of Hugging Face."""
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    words = special + [chr(code) for code in range(32, 127)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    # Whole words stay whole and are unknown: some 7,000 tokens, as few as the real one has.
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=special[1:])
    fast.save_pretrained(folder)
    model = llama(vocab_size=len(words), max_position_embeddings=16384, num_hidden_layers=2)
    model.save_pretrained(folder)


def test_both_processes_give_the_same_answer(tmp_path):
    saved_model(tmp_path / "model")
    environment = dict(os.environ, PYTHONPATH=str(ROOT / "runtime" / "python"))
    command = [sys.executable, "-m", "kvtier.demo", "--model", str(tmp_path / "model"),
               "--budget", "1.0", "--dtype", "float32", "--disk-path", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = {line[:19].strip(): line[19:].strip() for line in done.stdout.splitlines()}
    assert lines["restored"] == lines["not restored"] == lines["full attention"] != ""
    assert "blocks verified" in done.stdout and "time to first token, restored" in done.stdout
    # Nothing is left on the disk but the model.
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
