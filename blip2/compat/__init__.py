"""Hugging Face's class names over the same models: change the import line, keep the program.

    from blip2 import Blip2Processor, Blip2ForConditionalGeneration

    processor = Blip2Processor.from_pretrained("Salesforce/blip2-opt-2.7b")
    model = Blip2ForConditionalGeneration.from_pretrained("Salesforce/blip2-opt-2.7b")
    inputs = processor(image, "Question: how many dogs are there? Answer:", return_tensors="pt")
    processor.decode(model.generate(**inputs)[0], skip_special_tokens=True)

Names, defaults, shapes and values are those of transformers 5. Intended differences:

- An image that would be ignored is an error: too few image tokens, none, masked ones, numbers that do not pair up.
- One image can be used with many texts, and one text with many images.
- Padding never changes an answer, on either side.
- ``generation_config.json`` of the model's folder is used; the reference reads it, but uses the language model's.
- Special tokens are those of the model's layout; "<image>" or "</s>" within a text for the processor is text.
  (``processor.tokenizer`` parses them as tokens.)
- Padding is put where the model needs it, whatever the tokenizer's files say; ``padding_side`` may be set. Input of an
  InstructBLIP's Q-Former is padded at the end, where it changes nothing.
- Transparency is put on white. Images read here (paths, URLs) are also rotated upright by their EXIF and converted to
  sRGB; PIL images and arrays are used as they are, as in the reference.
- Assisted generation and prompt lookup give the same text as generation without them.

``generate`` counts tokens and changes scores as the reference does (``repetition_penalty`` includes an OPT's prompt
with the image's tokens), and draws the same samples from the same ``torch.manual_seed``. Not supported: other decoding
strategies (contrastive, grouped or constrained beams, guidance, watermarks), quantised caches, decoder prompts.
"""

from blip2.compat.config import (
    Blip2Config,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    InstructBlipConfig,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
)
from blip2.compat.generative import Blip2ForConditionalGeneration
from blip2.compat.instruct import InstructBlipForConditionalGeneration, InstructBlipProcessor
from blip2.compat.others import (
    Blip2Model,
    Blip2QFormerModel,
    Blip2TextModelWithProjection,
    Blip2VisionModel,
    Blip2VisionModelWithProjection,
)
from blip2.compat.pixels import BlipImageProcessor
from blip2.compat.processor import Blip2Processor, BlipProcessor
from blip2.compat.records import BatchFeature, ModelOutput
from blip2.compat.retrieval import Blip2ForImageTextRetrieval

__all__ = [
    "BatchFeature",
    "Blip2Config",
    "Blip2ForConditionalGeneration",
    "Blip2ForImageTextRetrieval",
    "Blip2Model",
    "Blip2Processor",
    "Blip2QFormerConfig",
    "Blip2QFormerModel",
    "Blip2TextModelWithProjection",
    "Blip2VisionConfig",
    "Blip2VisionModel",
    "Blip2VisionModelWithProjection",
    "BlipImageProcessor",
    "BlipProcessor",
    "InstructBlipConfig",
    "InstructBlipForConditionalGeneration",
    "InstructBlipProcessor",
    "InstructBlipQFormerConfig",
    "InstructBlipVisionConfig",
    "ModelOutput",
]
