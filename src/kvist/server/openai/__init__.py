"""OpenAI's API: models, chat completions, completions, responses, embeddings, as unmodified clients speak it; Azure's
paths to them; and `/v1/rerank`."""

from fastapi import APIRouter

from kvist.server.errors import RESPONSES
from kvist.server.openai.azure import add_azure
from kvist.server.openai.chat import add_chat
from kvist.server.openai.completions import add_completions
from kvist.server.openai.embeddings import add_embeddings
from kvist.server.openai.logprobs import TokenTexts
from kvist.server.openai.models import add_models
from kvist.server.openai.rerank import add_rerank
from kvist.server.openai.responses import add_responses
from kvist.server.settings import ServerSettings
from kvist.service.chat import Chat
from kvist.service.serving import Serving


def router(serving: Serving, settings: ServerSettings) -> APIRouter:
    """All routes of OpenAI's API. Nothing of `settings` matters here: who may ask, and for how long, is seen to before
    and below."""
    routes = APIRouter(tags=["OpenAI"], responses=RESPONSES)
    chat, texts = Chat(serving), TokenTexts(serving.tokenizer)
    add_models(routes, serving)
    answer_chat = add_chat(routes, serving, chat, texts)
    continue_text = add_completions(routes, serving, texts)
    add_responses(routes, serving, chat, texts)
    embed = add_embeddings(routes, serving)
    add_rerank(routes, serving)
    add_azure(routes, answer_chat, continue_text, embed)
    return routes
