"""A Llama-shaped model through Transformers, its linears in NF4 or LLM.int8(), beside the same model in 16 bits.

The model is made here, of random numbers, saved, and loaded once per format.  Printed are: tokens per second of
generate() and of a decoding step in a CUDA graph (static cache), the prefill of 2048 tokens, memory after loading, and
the peak of a training step of LoRA adapters.  Ratios are to the 16-bit model of the same activations: NF4 to bf16, int8
to f16.  Exit status 1 if a line misses what it must reach.
Usage: python bench/bench_model.py [--json FILE] [--only decode,prefill,train] [--formats bf16,nf4,f16,int8]
       [--hidden N] [--layers N] [--tokens N]
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import tempfile
import time

import torch
import transformers

PARTS = ("decode", "prefill", "train")
FORMATS = {  # name: (dtype, BitsAndBytesConfig's arguments, what it is compared with)
    "bf16": (torch.bfloat16, None, None),
    "nf4": (
        torch.bfloat16,
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.bfloat16,
            "bnb_4bit_use_double_quant": True,
        },
        "bf16",
    ),
    "f16": (torch.float16, None, None),
    "int8": (torch.float16, {"load_in_8bit": True}, "f16"),
}
# (format, line): the least ratio of its speed to the 16-bit model's.
MUSTS = {
    ("nf4", "graph 1"): 1.5,
    ("nf4", "graph 8"): 1.5,
    ("nf4", "eager 1"): 1.0,
    ("nf4", "eager 8"): 1.0,
    ("int8", "prefill"): 1.3,
    ("int8", "graph 1"): 1.0,
}
PROMPT, PREFILL, TRAINED = 16, 2048, 1024


def config_of(arguments):
    hidden = arguments.hidden
    heads = max(hidden // 128, 2)
    return transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        vocab_size=32000,
        max_position_embeddings=4096,
        pad_token_id=0,
    )


def save_model(config, folder, device):
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(previous)
    model.generation_config.eos_token_id = None  # every run makes as many tokens
    model.save_pretrained(folder)


def load_model(folder, name, device):
    dtype, quantised, _ = FORMATS[name]
    extra = {"quantization_config": transformers.BitsAndBytesConfig(**quantised)} if quantised else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, **extra)


def synchronize(device):
    if device != "cpu":
        torch.cuda.synchronize()


def seconds_of(run, device, samples):
    """Median seconds of a call, after two."""
    times = []
    for i in range(samples + 2):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        if i >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def graph_of(run):
    """`run` captured, as a function that replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def ids(batch, length, device):
    return torch.randint(1, 32000, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)


@torch.no_grad()
def decode_lines(model, device, tokens):
    """{line: tokens per second} of generate(), and of a step behind a prompt, in a graph where there is a card."""
    lines = {}
    for batch in (1, 8):
        prompt = ids(batch, PROMPT, device)

        def generate(prompt=prompt):
            model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)

        lines[f"eager {batch}"] = batch * tokens / seconds_of(generate, device, 3)
        cache = transformers.StaticCache(config=model.config, max_cache_len=256)
        model(prompt, past_key_values=cache, cache_position=torch.arange(PROMPT, device=device))
        token, place = ids(batch, 1, device), torch.tensor([PROMPT], device=device)

        def step(token=token, cache=cache, place=place):
            model(token, past_key_values=cache, cache_position=place, position_ids=place[None])

        replay = step if device == "cpu" else graph_of(step)
        lines[f"graph {batch}"] = batch / seconds_of(replay, device, 30)
    return lines


@torch.no_grad()
def prefill_lines(model, device):
    prompt = ids(1, PREFILL, device)
    return {"prefill": PREFILL / seconds_of(lambda: model(prompt, use_cache=False), device, 5)}


def train_lines(model, device):
    """Tokens per second, and MB at the peak, of a step of LoRA adapters on every linear of the layers."""
    import peft

    adapters = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, adapters)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = ids(1, TRAINED, device)

    def step():
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    lines = {"train": TRAINED / seconds_of(step, device, 3)}
    if device != "cpu":
        lines["train peak MB"] = torch.cuda.max_memory_allocated() / 1e6
    return lines


def measure(folder, name, device, arguments):
    model = load_model(folder, name, device).eval()
    lines = {"memory MB": model.get_memory_footprint() / 1e6}
    for part in arguments.only.split(","):
        if part == "decode":
            lines |= decode_lines(model, device, arguments.tokens)
        elif part == "prefill":
            lines |= prefill_lines(model, device)
        elif part == "train" and name in ("bf16", "nf4"):
            lines |= train_lines(model, device)
    return lines


def report(found):
    """Print every line, and its ratio to the model of 16 bits; returns the lines that miss."""
    missed = []
    print(f"{'format':8} {'line':14} {'value':>12} {'16 bits':>12} {'ratio':>7} {'must':>6}")
    for name, lines in found.items():
        other = found.get(FORMATS[name][2])
        if other is None:
            continue
        for line, value in lines.items():
            least = MUSTS.get((name, line))
            ratio = value / other[line]
            verdict = "" if least is None else "ok" if ratio >= least else "MISSED"
            print(f"{name:8} {line:14} {value:12.1f} {other[line]:12.1f} {ratio:7.3f} {least or '':>6} {verdict}")
            if verdict == "MISSED":
                missed.append((name, line))
        if "train peak MB" in lines:
            saved = other["memory MB"] - lines["memory MB"]
            less = other["train peak MB"] - lines["train peak MB"]
            verdict = "ok" if less >= saved else "MISSED"
            print(f"{name:8} a step takes {less:.0f} MB less, the weights {saved:.0f} MB {verdict}")
            missed += [(name, "train peak MB")] if less < saved else []
    return missed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the lines to this file too")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"some of {','.join(FORMATS)}")
    parser.add_argument("--hidden", type=int, default=4096, help="the model's width (default: 4096)")
    parser.add_argument("--layers", type=int, default=8, help="its layers (default: 8)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate (default: 64)")
    arguments = parser.parse_args()
    for given, known in ((arguments.only, PARTS), (arguments.formats, FORMATS)):
        unknown = set(given.split(",")) - set(known)
        if unknown:
            parser.error(f"{', '.join(sorted(unknown))} is not one of {', '.join(known)}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(config_of(arguments), folder, device)
        for name in arguments.formats.split(","):
            gc.collect()
            if device != "cpu":
                torch.cuda.empty_cache()
            found[name] = measure(folder, name, device, arguments)
    print(torch.cuda.get_device_name() if device != "cpu" else "cpu", torch.__version__, transformers.__version__)
    missed = report(found)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"missed": missed, "lines": found}, file, indent=1)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
