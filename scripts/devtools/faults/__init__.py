"""Attacks on the worker's promises: what `scripts/faults` runs, by `campaign`.

`cluster` has what is attacked: servers behind proxies (`proxy`) that misbehave, workers, and repeatable jobs,
also as a stream. `observer` reads from outside what became of the jobs, `undisturbed_run` compares their
objects with those of a second run, and `verdict` counts. Everything left to chance comes from the seed.

To add an attack, write a module with `attack(count, seed) -> Verdict` and name it in `campaign.ATTACKS`, with
its sizes; `tests/faults` runs the short one. This one suspends the worker's process `count` times:

    def attack(count: int, seed: int) -> Verdict:
        draw = random.Random(seed)
        with running_cluster("suspended", seed, lease_s=2) as cluster, JobObserver(cluster) as observer:
            worker = cluster.work()
            with JobStream(cluster, observer.unfinished, jobs=50 * count, ahead=20) as stream:
                for _ in range(count):
                    wait_for(lambda: len(observer.running) > 2, START_S, "the worker has jobs in hand")
                    time.sleep(draw.uniform(0, 0.5))
                    observer.hit(worker.process)
                    with suspended(worker.process):
                        time.sleep(5)
                stream.join()
            observer.drain(60)
            verdict = observer.verdict(faults=count)
            undisturbed_run.compare(cluster, verdict, len(stream.made))
        verdict.require(verdict.recovery_s_max < 30, "A suspended worker's jobs ran again too late.")
        return verdict

`processes.children` finds the processes below another, such as a supervisor's; what a process has to do from
inside, such as ending at a poison image, is added to `tiny_network`.
"""
