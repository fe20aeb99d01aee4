"""Chat templates that render text messages as the real families' templates do.

Each keeps the traits that trip code up: Gemma and Llama 3 write BOS into the text; Gemma 2 refuses a system message,
Gemma 3 prepends it to the user's first one; Llama 3 writes today's date unless `date_string` is given; Qwen 2.5 inserts
a system message of its own; Qwen 3 ends a prompt in an empty thought when `enable_thinking` is off. Gemma and Llama
trim messages; Qwen does not.
"""

GEMMA3 = """\
{{ bos_token }}
{%- set turns = namespace(prefix='', messages=messages) -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] -%}
    {%- set turns.prefix = (first if first is string else first[0]['text']) + '\n\n' -%}
    {%- set turns.messages = messages[1:] -%}
{%- endif -%}
{%- for message in turns.messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\n' + (turns.prefix if loop.first else '') }}
{%- if message['content'] is string -%}
    {{ message['content'] | trim }}
{%- else -%}
    {%- for part in message['content'] -%}
        {{ '<start_of_image>' if part['type'] == 'image' else part['text'] | trim }}
    {%- endfor -%}
{%- endif -%}
{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<start_of_turn>model\n' }}
{%- endif -%}
"""

_NO_SYSTEM = """\
{%- if messages[0]['role'] == 'system' -%}
    {{ raise_exception('System role not supported') }}
{%- endif -%}
"""
GEMMA2 = _NO_SYSTEM + GEMMA3

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now('%d %b %Y') %}
    {%- else %}
        {%- set date_string = '26 Jul 2024' %}
    {%- endif %}
{%- endif %}
{%- set turns = namespace(system='', messages=messages) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set turns.system = messages[0]['content'] | trim %}
    {%- set turns.messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{{- 'Cutting Knowledge Date: December 2023\n' }}
{{- 'Today Date: ' + date_string + '\n\n' }}
{{- turns.system + '<|eot_id|>' }}
{%- for message in turns.messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

QWEN25 = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. ' }}
    {{- 'You are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

QWEN3 = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
