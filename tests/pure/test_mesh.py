"""The mesh: pure arithmetic over ranks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triloom.errors import ConfigError, MeshError
from triloom.mesh import Mesh, check_divides, make_mesh, nearest_meshes

meshes = st.lists(st.integers(1, 4), min_size=0, max_size=4).map(
    lambda sizes: Mesh(tuple((f"axis{i}", size) for i, size in enumerate(sizes)))
)


@given(meshes)
def test_coords_and_rank_are_inverse(mesh: Mesh) -> None:
    seen = [tuple(mesh.coords(r).items()) for r in range(mesh.size)]
    assert len(set(seen)) == mesh.size
    assert [mesh.rank(dict(c)) for c in seen] == list(range(mesh.size))


@given(meshes, st.data())
def test_partition_covers_every_rank_once(mesh: Mesh, data: st.DataObject) -> None:
    axes = data.draw(st.sets(st.sampled_from([*mesh.names, "absent"])))
    groups = mesh.partition(*axes)
    assert sorted(itertools.chain(*groups)) == list(range(mesh.size))
    assert {len(g) for g in groups} == {Mesh(tuple(a for a in mesh.axes if a[0] in axes)).size}
    for group in groups:
        assert list(group) == sorted(group)
        fixed = [{n: c for n, c in mesh.coords(r).items() if n not in axes} for r in group]
        assert all(f == fixed[0] for f in fixed)
        assert all(mesh.peers(r, *axes) == group for r in group)


def test_default_order_puts_tensor_parallel_ranks_side_by_side() -> None:
    mesh = make_mesh(8, pp=2, tp=2)
    assert mesh.axes == (("dp", 2), ("pp", 2), ("tp", 2))
    assert mesh.partition("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert mesh.partition("pp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert mesh.partition("dp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert mesh.peers(5, "dp", "tp") == (0, 1, 4, 5)
    assert mesh.coords(5) == {"dp": 1, "pp": 0, "tp": 1}
    assert str(mesh) == "dp=2 x pp=2 x tp=2"


def test_order_decides_who_are_neighbours() -> None:
    mesh = make_mesh(8, dp=2, pp=2, tp=2, order=("tp", "pp", "dp"))
    assert mesh.partition("dp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert mesh.partition("tp") == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_an_axis_the_mesh_does_not_have_counts_as_one() -> None:
    mesh = Mesh((("dp", 3),))
    assert mesh.axis("tp") == 1
    assert mesh.partition("tp") == ((0,), (1,), (2,))
    assert str(Mesh(())) == "(one rank)" and Mesh(()).size == 1 and Mesh(()).coords(0) == {}


@given(st.integers(1, 24), st.integers(1, 4), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 4)))
def test_make_mesh_fits_the_world_or_says_what_would(world: int, pp: int, tp: int, dp: int | None) -> None:
    fits = world % (pp * tp) == 0 if dp is None else dp * pp * tp == world
    if fits:
        mesh = make_mesh(world, dp=dp, pp=pp, tp=tp)
        assert (mesh.size, mesh.axis("pp"), mesh.axis("tp")) == (world, pp, tp)
        return
    with pytest.raises(MeshError) as caught:
        make_mesh(world, dp=dp, pp=pp, tp=tp)
    assert f"the {world} ranks" in str(caught.value)
    near = nearest_meshes(world, dp=dp, pp=pp, tp=tp)
    assert near and all(m.size == world and str(m) in str(caught.value) for m in near)


def test_errors_print_the_arithmetic_and_the_nearest_meshes() -> None:
    with pytest.raises(MeshError, match=r"pp=2 x tp=2 = 4 must divide the 6 ranks") as caught:
        make_mesh(6, pp=2, tp=2)
    near = ("dp=1 x pp=2 x tp=3", "dp=1 x pp=3 x tp=2")  # 3 for 2 is nearer than 1 for 2
    assert all(m in str(caught.value) for m in near), caught.value
    with pytest.raises(MeshError, match=r"dp=2 x pp=2 x tp=2 = 8 must equal the 4 ranks"):
        make_mesh(4, dp=2, pp=2, tp=2)
    with pytest.raises(
        MeshError, match=r"tp=3 does not divide heads=8 \(8 = 2 x 3 \+ 2\); tp sizes that work: 1, 2, 4, 8"
    ):
        check_divides("heads", 8, "tp", 3)
    check_divides("heads", 8, "tp", 4)


@pytest.mark.parametrize("size", [0, -1, 1.5, "2", True])
def test_sizes_must_be_positive_integers(size: object) -> None:
    with pytest.raises(MeshError, match=r"'tp' must have a positive integer size"):
        Mesh((("tp", size),))  # type: ignore[arg-type]


def test_bad_axes_ranks_and_coordinates_are_refused() -> None:
    mesh = make_mesh(4, tp=2)
    for call, says in [
        (lambda: Mesh((("dp", 2), ("dp", 2))), "different names"),
        (lambda: make_mesh(4, order=("dp", "tp")), "once each"),
        (lambda: make_mesh(4, tp=0), "tp must be a positive integer, got 0"),
        (lambda: mesh.coords(4), "rank 4 is outside the mesh dp=2 x pp=1 x tp=2 of 4 ranks"),
        (lambda: mesh.rank({"tp": 2}), "tp=2 is outside"),
    ]:
        with pytest.raises(ConfigError, match=says):
            call()
