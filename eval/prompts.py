"""Chat templates (Jinja over chat messages): images first, then the text of a turn."""

LLAVA = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# name of a template that may stand in for the checkpoint's own -> template
PROMPTS = {
    # conversation vicuna_v1 of the original LLaVA: its system sentence, then the turns
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. " + LLAVA
}
