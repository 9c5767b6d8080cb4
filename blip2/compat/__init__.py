"""The names that Hugging Face's users know, over the same models: change the import line, keep the program.

    from blip2 import Blip2Processor, Blip2ForConditionalGeneration

    processor = Blip2Processor.from_pretrained("Salesforce/blip2-opt-2.7b")
    model = Blip2ForConditionalGeneration.from_pretrained("Salesforce/blip2-opt-2.7b")
    inputs = processor(image, "Question: how many dogs are there? Answer:", return_tensors="pt")
    processor.decode(model.generate(**inputs)[0], skip_special_tokens=True)

Names, defaults, shapes and values are those of transformers 5. What differs does so on purpose:

- An image that would be ignored is an error: too few image tokens, none at all, masked ones, numbers that do not pair.
- One image goes with many texts, one text with many images.
- Padding never changes an answer, whichever side it stands on.
- ``generation_config.json`` of the model's folder is heeded; the reference reads it and then asks the language model's.
- Special tokens are those that the model's layout has; "<image>" or "</s>" within a text that the processor is given is
  text. (``processor.tokenizer`` reads them as tokens.)
- Padding stands where the model needs it, whatever the tokenizer's files say; ``padding_side`` may be set. What the
  Q-Former of an InstructBLIP reads is padded at its end, where it changes nothing.
- Images are laid on white where they are transparent. Those that are read here (paths, addresses) are also turned
  upright by their EXIF and converted to sRGB; PIL images and arrays are taken as they stand, as the reference does.
- An assistant, or words looked up in the prompt, write what would be written without them.

``generate`` counts and changes scores as the reference does (``repetition_penalty`` sees an OPT's prompt, the image's
tokens among it), and draws the same samples from the same ``torch.manual_seed``. Refused are other ways of decoding
(contrastive, grouped or constrained beams, guidance, watermarks), quantised caches, and prompts of the decoder.
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
