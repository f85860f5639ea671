"""Tasks of lm-evaluation-harness over a file of questions, as its YAML."""

_QUESTIONS = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""

_CHOICES = (
    _QUESTIONS
    + """
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
"""
)

TASK = (
    _CHOICES
    + """
task: sums
metric_list: {metrics}
"""
)

FEW_SHOT = (
    _CHOICES
    + """
task: shown
fewshot_split: test
num_fewshot: 2
metric_list: [{{metric: acc}}]
"""
)

GENERATED = (
    _QUESTIONS
    + """
task: said
output_type: generate_until
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: ["@@"], max_gen_toks: 3, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
)
