"""How much host memory is free: the limits of control groups count, a parent's too."""

from pathlib import Path

from offload_runtime.memory import cgroup_limits, host_free_bytes


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_cgroup_v2_limit_of_a_parent_counts(tmp_path: Path) -> None:
    top = "sys/fs/cgroup"
    write_tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/box/job\n",
            f"{top}/box/job/memory.max": "max\n",
            f"{top}/box/job/memory.current": "5\n",
            f"{top}/box/job/memory.stat": "inactive_file 1\n",
            f"{top}/box/memory.max": "1000\n",
            f"{top}/box/memory.current": "700\n",
            f"{top}/box/memory.stat": "anon 1\ninactive_file 200\n",
        },
    )
    assert cgroup_limits(tmp_path) == [(1000, 500)]
    assert host_free_bytes(tmp_path) == 500


def test_cgroup_v1(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory"
    write_tree(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu:/x\n4:memory:/x\n",
            f"{folder}/x/memory.limit_in_bytes": "900\n",
            f"{folder}/x/memory.usage_in_bytes": "300\n",
            f"{folder}/x/memory.stat": "total_inactive_file 100\n",
            f"{folder}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{folder}/memory.usage_in_bytes": "1\n",
            f"{folder}/memory.stat": "total_inactive_file 0\n",
        },
    )
    assert cgroup_limits(tmp_path) == [(900, 200)]


def test_no_cgroup(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path) == []
    assert host_free_bytes(tmp_path) > 0
