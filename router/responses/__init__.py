"""OpenAI's Responses API over chat completions: what comes in becomes a chat body, what goes out a response.

The engine's own Responses layer is not used: with a chat body the prefill and the decode workers render the
same prompt as for ``/v1/chat/completions``, and every strategy works through it. Nothing is stored.
"""

from router.responses.call import ResponsesCall
from router.responses.request import Asked, translate

__all__ = ["Asked", "ResponsesCall", "translate"]
