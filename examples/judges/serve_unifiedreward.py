"""UnifiedReward 2.0 behind an address: neighbor-grpo serve --rewards serve_unifiedreward.py:mean

`alignment`, `coherence` and `style` are the numbers from 1 to 5 that the model writes about a picture, and `mean` is
their mean. UNIFIEDREWARD names another checkpoint, a folder or a name on the hub; the 2.0 models on Qwen2.5-VL
have 3, 7, 32 and 72 billion parameters, and those on Qwen3-VL open the same way.

The question is that of https://github.com/CodeGoat24/UnifiedReward (point_score_ACS_image_generation.py), on which the
models were trained. An answer that is not exactly what the question asks for is an error, never a reward.
"""

import os
import re
from functools import cache, partial

import torch
import transformers

CHECKPOINT = os.environ.get("UNIFIEDREWARD", "CodeGoat24/UnifiedReward-2.0-qwen-7b")
AXES = "Alignment", "Coherence", "Style"
AT_ONCE = 8  # pictures
TOKENS = 256  # of an answer at most; three numbers of sixteen digits take about a hundred
QUESTION = """\
You are presented with a generated image and its associated text caption. \
Your task is to analyze the image across multiple dimensions in relation to the caption. Specifically:
Provide overall assessments for the image along the following axes (each rated from 1 to 5):
- Alignment Score: How well the image matches the caption in terms of content.
- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).
- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.

Output your evaluation using the format below:

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Your task is provided as follows:
Text Caption: ["""  # and the prompt, and ]
ANSWER = r"\s*".join(rf"{axis} Score \(1-5\): *([0-9]+(?:\.[0-9]+)?)" for axis in AXES)


def read(answer):
    "The three numbers of an answer that has nothing else in it."
    match = re.fullmatch(rf"\s*{ANSWER}\s*", answer)
    scores = [float(number) for number in match.groups()] if match else []
    if not match or not all(1 <= score <= 5 for score in scores):
        raise ValueError(f"the answer must be a score from 1 to 5 for each of {', '.join(AXES)}, and is {answer!r}")
    return dict(zip(AXES, scores))


class Judge:
    "The model and what prepares its questions."

    def __init__(self):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        load = transformers.AutoModelForImageTextToText.from_pretrained
        self.model = load(CHECKPOINT, dtype="auto").to(device).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(CHECKPOINT)
        self.processor.tokenizer.padding_side = "left"  # the answers begin at the same place

    @torch.inference_mode()
    def answers(self, pictures, prompts):
        "What the model writes about some pictures."
        images = [dict(type="image", image=picture.convert("RGB")) for picture in pictures]
        questions = [dict(type="text", text=f"{QUESTION}{prompt}]") for prompt in prompts]
        chats = [[dict(role="user", content=[image, text])] for image, text in zip(images, questions)]
        given = self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs=dict(padding=True),
        ).to(self.model.device)  # fmt: skip
        written = self.model.generate(**given, do_sample=False, max_new_tokens=TOKENS)
        written = written[:, given["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        ended = torch.isin(written, torch.tensor(ends, device=written.device)).any(1).tolist()
        texts = self.processor.batch_decode(written, skip_special_tokens=True)
        return [text if whole else f"{text} ... (cut off)" for text, whole in zip(texts, ended)]


judge = cache(Judge)


def scores(pictures, prompts):
    "The three numbers about each picture."
    parts = [slice(start, start + AT_ONCE) for start in range(0, len(pictures), AT_ONCE)]
    return [read(answer) for part in parts for answer in judge().answers(pictures[part], prompts[part])]


def axis(name, pictures, prompts, records):
    return [found[name] for found in scores(pictures, prompts)]


alignment, coherence, style = (partial(axis, name) for name in AXES)


def mean(pictures, prompts, records):
    return [sum(found.values()) / len(AXES) for found in scores(pictures, prompts)]


if __name__.startswith("neighbor_grpo_reward"):  # named by --rewards: what is missing is said before the first picture
    judge()
