"""What people have: one row for each kind of input that was tried, what happens, and where it was seen to go wrong.

Rows of docs/reliability.md, by part: (input, what happens, public reports of the kind; none for the kinds that this
project's own trials began with).
"""

from __future__ import annotations

INPUTS: dict[str, list[tuple[str, str, str]]] = {
    "Conversations and prompts": [
        (
            "a chat template that writes BOS, and a tokenizer that adds it",
            "exactly one, in packed rows too; `starts_with` in the report says which token every row begins with",
            "deepseek-ai/DeepSeek-R1#151, EleutherAI/lm-evaluation-harness#3333, huggingface/open-r1#462",
        ),
        (
            "packed text of a model that is lost without BOS (Gemma)",
            "every row begins with it, also in the middle of a document",
            "EleutherAI/lm-evaluation-harness#2382, EleutherAI/lm-evaluation-harness#1465",
        ),
        ("a conversation of several turns", "every turn of the assistant is a target", ""),
        (
            "a template without `{% generation %}` marks",
            "targets are told by the difference of prefixes, turn by turn; never everything, never nothing",
            "marin-community/marin#7237, huggingface/transformers#34172",
        ),
        (
            "a marked turn that begins the text, or ends in white space that the tokenizer drops",
            "the marks count by character, so nothing after them is a target",
            "huggingface/transformers#47325",
        ),
        (
            "a template whose prompt is no prefix of the conversation (`<think>` opened for generation)",
            "what both share decides, checked against the turn's own words; where they are not found, refused: "
            "the prompt for message N is not how the conversation begins",
            "huggingface/trl#5213",
        ),
        (
            "a conversation that ends with the user",
            "calibrated on; in `unlearn` refused by line: has nothing that the model answers",
            "",
        ),
        (
            "turns that are not to be learned (`weight: 0`, `train: false`, `loss: false`)",
            "no targets, with and without marks",
            "axolotl-ai-cloud/axolotl#1703, hiyouga/LlamaFactory#9630",
        ),
        (
            "roles called human, gpt, bot, ai or model; turns of from and value under `messages`",
            "the user's and the assistant's; any other name in ShareGPT's `from` is refused with those that are known",
            "axolotl-ai-cloud/axolotl#752, hiyouga/LlamaFactory#6878, Tencent/AngelSlim#7",
        ),
        (
            "a content in parts (`[{type: text, text: ...}]`)",
            "joined to text; a part of another type is refused: has a part of type 'image', and only text is read",
            "abetlen/llama-cpp-python#2324, vllm-project/vllm#54987",
        ),
        (
            "arguments of tool calls as JSON in a string (OpenAI)",
            "handed to the template as an object, so they are JSON once; as a string where the template wants one",
            "oumi-ai/oumi#2599, vortico/flama#258, sgl-project/sglang#12123",
        ),
        (
            "`tools`, or `messages`, as JSON in a cell of a table",
            "read as JSON; text that is none is refused by line",
            "modelscope/ms-swift#10125",
        ),
        (
            "several templates under names (default, tool_use, rag)",
            "tool_use where a row has tools, else default, for marks as well as for text; none of them: refused",
            "",
        ),
        (
            "a template that asks for today's date",
            "gets 26 Jul 2024 on every day, so that a row is the same row tomorrow; the prompt format says so",
            "oobabooga/textgen#6692",
        ),
        (
            "a template that refuses (no system role, roles that do not alternate)",
            "one line with the row and the template's own words",
            "EleutherAI/lm-evaluation-harness#2069, hiyouga/LlamaFactory#8217",
        ),
        (
            "messages for a model without a template",
            "refused: there is no chat template; give --prompt-format FILE.jinja, or text instead",
            "",
        ),
        (
            "question and answer, prompt and response, for an instruct model",
            "through the tokenizer's template (`--prompt-format auto`), which recipe and report name",
            "hiyouga/LlamaFactory#5923, QwenLM/Qwen3#692",
        ),
        ("prompt and completion as text, or both as messages (TRL)", "as they are; through the template", ""),
        (
            "instruction, input or context, output (Alpaca, Dolly); once more as `text`",
            "the pair counts and its output is the answer; of input and context one may be there",
            "",
        ),
        (
            "`context`, `input` or `choices` beside question and answer",
            "refused: has 'context', for which 'question' + 'answer' have no place; nothing of the prompt is dropped",
            "instructlab/sdg#258, unslothai/unsloth#11292",
        ),
        (
            "a system prompt beside prompt and completion",
            "first message in a template; without one refused, not dropped",
            "",
        ),
        (
            "`chosen` and `rejected`; a completion with `label: false` (KTO)",
            "refused: keep one of them as 'completion'; an answer that was rated bad: leave such rows out",
            "huggingface/trl#1181, hiyouga/LlamaFactory#4564",
        ),
        (
            "prompts so long that no answer is left in a row (`--answers-only`)",
            "all of them: refused, all tokens are masked",
            "snowflakedb/ArcticTraining#335",
        ),
    ],
    "Files": [
        (
            "JSON lines under any name (.jsonl, .JSONL, .ndjson, .json), arrays, an object that holds one array",
            "rows; fields of one name twice count as Python's json has them, the last",
            "",
        ),
        (
            "JSON in a file called .txt or without an ending, on one line or many",
            "refused, also by `unlearn`: holds JSON, which is not read as prose",
            "",
        ),
        (
            "two arrays in one .json file; one with no end",
            "refused: there is more after the array's end; the array has no end",
            "",
        ),
        (
            "columns of JSON (pandas' `to_json`), splits or ids as keys",
            "refused with the fields that are there and the layouts that are known",
            "",
        ),
        (
            ".csv and .tsv with quoted separators and line ends; without quotation (GLUE)",
            "as the csv module reads them; a row of another number of fields is refused by line",
            "fastai/fastai#4023, huggingface/datasets#1570",
        ),
        (
            "semicolons for commas, no first line of names, `sep=,`, names with spaces or in capitals",
            "refused with the names that are found",
            "appvision-ai/fast-bert#243",
        ),
        (
            "a byte order mark (Excel), CRLF, lines that end in CR alone",
            "read; CR alone in .csv too, in .txt refused: has carriage returns where lines end in \\n",
            "UKGovernmentBEIS/inspect_ai#5353, huggingface/datasets#622",
        ),
        (
            "UTF-16, Latin-1",
            "refused: byte 0 is not UTF-8, or holds zero bytes; convert the file",
            "UKGovernmentBEIS/inspect_ai#5361",
        ),
        (
            ".gz and .zst of several members or frames, as parallel packers write them",
            "read to the end",
            "indygreg/python-zstandard#59, dotnet/runtime#129047",
        ),
        (
            "Parquet, folders of `datasets`, names on the hub; nulls that a table fills in",
            "rows without the nulls, in messages and tools too; text that is null or bytes is refused by row",
            "modelscope/ms-swift#10125",
        ),
        (
            "a number where text belongs (`answer: 4`), an empty answer",
            "refused by line",
            "",
        ),
        (
            "an empty text",
            "nothing of a packed row; a row to learn or forget is refused: has no two tokens",
            "",
        ),
        (
            "one very long document or line, the last of a file",
            "tokenized whole, cut into rows of --length; in `unlearn` into windows that predict every token once",
            "",
        ),
        (
            "fewer rows than are taken by default",
            "what there is is taken, and the report says so; an explicit --samples insists",
            "ModelCloud/GPTQModel#289",
        ),
        (
            "`--length` beyond the model's positions (RoBERTa's offset counted)",
            "refused: the model has N positions (config.json)",
            "huggingface/optimum#1748",
        ),
        (".xlsx, .docx, .xml", "refused with the kinds that are read", ""),
    ],
    "Checkpoints": [
        (
            "config says tied, the checkpoint has a head of its own",
            "the stored head is used; what transformers loads, by test",
            "huggingface/transformers#45127",
        ),
        (
            "`model.safetensors` beside an index of other shards",
            "refused: move away what is stale (transformers takes the one, others the other)",
            "Blaizzy/mlx-vlm#1464, Neph0s/CoSER#3",
        ),
        (
            "`pytorch_model.bin`, `consolidated.safetensors` or stray shards beside what the index names",
            "not looked at; pickles alone are refused",
            "ml-explore/mlx-swift-lm#408, huggingface/transformers#26729",
        ),
        (
            "a shard that the index names and that is not there",
            "refused: this shard is missing",
            "sgl-project/sglang#32279",
        ),
        (
            "names without `model.`, with `_orig_mod.`, `module.` or `base_layer.`",
            "as transformers loads them; adapters among them are refused",
            "",
        ),
        ('`"quantization_config": null`', "a float model", ""),
        (
            "a LoRA folder (DoRA, rsLoRA, rank and alpha patterns, biases, single tokens)",
            "merged into its base, which it names or --base-model gives; equal to peft's own answers, by test",
            "axolotl-ai-cloud/axolotl#2277",
        ),
        (
            "adapters with embeddings of more tokens than the base has",
            "the base is resized first; equal to peft's own answers",
            "hiyouga/LlamaFactory#3125, huggingface/peft#2898, allenai/open-instruct#142",
        ),
        (
            "adapters with a head of their own on a tied base",
            "written untied; equal to peft's own answers",
            "unslothai/unsloth#9331, huggingface/peft#2972",
        ),
        (
            "several adapters in folders of one folder",
            "refused with their names: give one of them",
            "huggingface/trl#609",
        ),
        ("a whole model and adapters beside it", "refused", ""),
        (
            "GGUF, FP8, compressed-tensors, MXFP4",
            "floats with --dequantize, else one line that says so",
            "",
        ),
        ("GPTQ, AWQ", "refused: of which the library makes no floats; give the model it was made from", ""),
        (
            "`generation_config.json` that transformers does not save (temperature without sampling), or no JSON",
            "kept byte for byte by all three jobs and by merges",
            "huggingface/transformers#29988, hiyouga/LlamaFactory#2545, QwenLM/Qwen3-ASR#210",
        ),
        (
            "`rope_scaling` of old and new keys (linear, dynamic, yarn, `type` or `rope_type`), sliding windows",
            "transformers' own numbers; an unknown one is refused",
            "",
        ),
        (
            "`attn_implementation` of a kernel that is not installed",
            "`quantize` does not need it; what opens whole models refuses in the library's words",
            "",
        ),
        (
            "`auto_map` and code beside the weights",
            "of a known model_type: read without the code, which is never run; else refused",
            "",
        ),
        (
            "a table padded beyond the tokenizer; a tokenizer longer than the table",
            "fine; a token that has no row is refused: is beyond the model's vocabulary",
            "unslothai/unsloth-zoo#923, huggingface/tokenizers#1609, EuroEval/EuroEval#52",
        ),
        ("Inf in 16-bit weights, NaN", "refused with the tensor's name", ""),
        (
            "experts that no calibration token reached",
            "counted in the report, with more --samples suggested; their error is not 0.0",
            "vllm-project/llm-compressor#20",
        ),
    ],
    "Tasks and requests": [
        (
            "`labels` for `label`, `pixel_values` for `inputs`",
            "the same; a missing label is refused by line",
            "",
        ),
        (
            "`--forget-where user=user-1` where there are user-10 and user-11",
            "user-1 alone; `user~REGEX` searches, shows each value, and asks again where one begins like another",
            "rcsb/py-rcsb_db#62",
        ),
        ("`a.b` or `a+b` as a value", "exactly that, no pattern", ""),
        ("`007` and 7; numbers", "as they stand in the file: 007 is not 7, 7.0 is not 7", ""),
        (
            "a value that is null, or a field that a row lacks",
            "matched by no value and no pattern; the word null is a value",
            "",
        ),
        (
            "values that differ in case, white space or how an accent is written",
            "not matched, and named before anything is done: nearly the same and stay",
            "",
        ),
        (
            "ids that are not there (`--forget-ids`), with a byte order mark, twice, CRLF",
            "refused with the first; read",
            "",
        ),
        (
            "rows of --forget that also stand in --retain, or twice in --train",
            "refused: have copies that would stay; --allow-duplicates",
            "",
        ),
        (
            "rows to forget with other fields, or fields in another order",
            "found by prompt and answer; in another case they are not, and named",
            "",
        ),
        (
            "a row to forget longer than --length",
            "forgotten whole, in windows",
            "",
        ),
    ],
}

SEARCHED = """Public reports were searched, in November 2026, for: double BOS; marks of generation that mask nothing or
everything; roles in ShareGPT; merging adapters with resized embeddings, heads and tied tables; adapters in folders;
arguments of tool calls; dates in templates; system roles; EOS after turns; contents in parts; weights of turns; KTO
labels; prompts that are no prefix; cut answers; CSV, byte order marks and UTF-16; frames of zstd; nulls in Parquet;
stale indexes; tokenizers longer than tables; generation configs that cannot be saved; calibration rows and templates;
deletion by prefix; labels of regression. Projects: transformers, tokenizers, datasets, peft, trl, optimum, open-r1,
lm-evaluation-harness, llm-compressor, auto-round, GPTQModel, AngelSlim, vllm, sglang, axolotl, LLaMA-Factory, unsloth,
ms-swift, torchtune, oumi, ArcticTraining, open-unlearning and others' repositories that the search led to."""
