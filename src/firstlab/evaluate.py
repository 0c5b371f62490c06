"""Evaluate a trained run, from its own saved configuration, on its own data or any other.

    python -m firstlab.evaluate run=DIR                                   # again, on the run's test set
    python -m firstlab.evaluate run=DIR data=mini_qa evaluation.limit=100 # on another task
    python -m firstlab.evaluate run=DIR data=parallel data.root=FOLDER    # on your own text
    python -m firstlab.evaluate run=DIR data=mine --config-dir FOLDER     # on the task of FOLDER/data/mine.yaml
    python -m firstlab.evaluate run=DIR variant=router evaluation.do_sample=true
    python -m firstlab.evaluate run=DIR "evaluation.skip_rates=[0.15,0.35]" # of a model with router.kind=routes

Every key of conf/ under data, evaluation, trainer and seed may be given, model.quantization (int8, int4), and
model.path where the base model has moved. Results go to DIR/evaluations/. Nothing that DIR says is run as code: where
its method or task is a class of your own, name the package again, trust=my_package.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from firstlab.config.command_line import guarded, own_folders, split_options


@guarded
def main(arguments: list[str]) -> None:
    """Parse, load, evaluate, print the table."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    arguments, folders = own_folders(arguments)
    options, words = split_options(arguments)
    if words:
        raise ValueError(f"{words[0]!r} is not KEY=VALUE; see python -m firstlab.evaluate --help")
    named, variant, trusted = (options.pop(key, None) for key in ("run", "variant", "trust"))
    if named is None:
        raise ValueError("run=DIR is missing; see python -m firstlab.evaluate --help")
    for key in options:
        if not re.fullmatch(r"(data|evaluation|trainer|seed)(\..*)?|model\.(quantization|path)", key):
            raise ValueError(f"{key} was fixed when the run was trained; --help names the keys that change")
    from firstlab.config import instantiate
    from firstlab.config.build import build_data, check_test_set, check_vocabulary
    from firstlab.evaluation.predictions import fingerprint, source_of
    from firstlab.evaluation.scoring import check_metrics
    from firstlab.model.quantization import quantize
    from firstlab.run.context import Run
    from firstlab.run.decisions import decided_routes
    from firstlab.run.load import load_run
    from firstlab.run.report import print_table, rows_of_record
    from firstlab.store import results
    from firstlab.store.files import claimed

    instantiate.trust([] if trusted is None else [trusted])
    directory = Path(os.path.expanduser(named))
    config, method, model, variant = load_run(directory, variant, options, folders)
    run = Run(config, method, directory, build_data(config), model)
    check_test_set(run.data)
    check_metrics(run.data.task, config.evaluation)
    check_vocabulary(config, run.data.tokenizer, model)
    routes = decided_routes(directory, method, variant, run.prompts(run.data.test))
    for rate in config.evaluation.skip_rates if "evaluation.skip_rates" in options and routes is None else ():
        model.routers.checked_rate(rate)
    # The text as well: the same files may hold other text the next time.
    out = directory / results.EVALUATIONS / f"{config.data.name}-{config.hash()}-{fingerprint(run.data.test)}"
    source = source_of(model, routes)
    quantize(model.merge_and_unload().lm, config.model.quantization)
    with claimed(out):
        variants = (results.read(out, "delete it to evaluate again") or {"variants": {}})["variants"]
        record = run.record(out, variants=variants | {variant: run.evaluate(variant, routes, source, out)})
        results.write(out, record)
    print_table(f"{config.data.name}: {named}", rows_of_record(record))
    print(json.dumps({"record": str(out / results.RESULT)}))


if __name__ == "__main__":
    main(sys.argv[1:])
