//! Which kernel does a product of bf16 factors, and in how many parts: tables, and the limits of Hopper's kernels.

use super::super::map::MAP_GRANULE;
use super::super::{Machine, Runtime};
use super::hopper::{OUTPUTS, Width};
use super::tensor::{LARGE, SMALL, weight_type};
use super::{Product, Reads};
use crate::dtype::DType;

/// What does a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    /// `product_*_small` of `matmul.cu`.
    Small,
    /// `product_*_large` of `matmul.cu`.
    Large,
    /// `matmul_hopper.cu`, with so many tokens a tile.
    Hopper(Width),
}

/// A line of the table: the products it is for, and what does them.
struct Line {
    /// Only where Hopper's instructions are and the product is within its kernels' limits.
    hopper: bool,
    most_rows: usize,
    most_columns: usize,
    path: Path,
}

const fn line(hopper: bool, most_rows: usize, most_columns: usize, path: Path) -> Line {
    Line {
        hopper,
        most_rows,
        most_columns,
        path,
    }
}

const ANY: usize = usize::MAX;

/// The first line whose bounds hold decides.
///
/// A large tile of a product of few rows or columns would multiply zeros. At 32 rows both portable tiles are limited by reading the
/// weight, and the small one has twice the blocks to do it with. On Hopper a wide tile decodes a weight once for 256 tokens; but at
/// 512 tokens of 2048 × 12288 it has 192 tiles for 132 multiprocessors, two rounds of which the second is half empty, where
/// middle ones have 384: three full rounds. By count, not measured.
const LINES: &[Line] = &[
    line(false, 32, ANY, Path::Small),
    line(false, ANY, 64, Path::Small),
    line(true, 64, ANY, Path::Hopper(Width::Narrow)),
    line(true, 512, ANY, Path::Hopper(Width::Middle)),
    line(true, ANY, ANY, Path::Hopper(Width::Wide)),
    line(false, ANY, ANY, Path::Large),
];

/// How a product is cut that has few tiles.
///
/// Its depth is divided so that about `full` blocks have work, and added up again in the order of the parts: 8 bytes are written and
/// read for each element and part, and there is one launch more. It pays where a part is still several stages deep.
struct Cut {
    /// Tiles that keep a device busy. A constant of the table and not of the device, since it decides the order of sums: 132
    /// multiprocessors, and as many blocks on each as its shared memory has room for.
    full: usize,
    /// A part is at least so deep.
    least: usize,
}

impl Path {
    /// By count, not measured. Few tiles are what `dx` of a wide layer has (512 tokens of 12288 → 2048: 64 tiles of Hopper's, 192
    /// stages deep) and what an adapter's first products have (512 tokens, rank 16: 16 small tiles). A stage of Hopper's is 0.2 to
    /// 0.6 µs; parts of 16 of them leave launch and sum small.
    const fn cut(self) -> Cut {
        match self {
            Self::Small => Cut { full: 528, least: 256 },
            Self::Large => Cut { full: 264, least: 512 },
            Self::Hopper(_) => Cut {
                full: 132,
                least: 1_024,
            },
        }
    }

    fn tiles(self, rows: usize, columns: usize) -> usize {
        let [of_rows, of_columns] = match self {
            Self::Small => [SMALL.rows, SMALL.columns],
            Self::Large => [LARGE.rows, LARGE.columns],
            Self::Hopper(width) => [width.tokens(), OUTPUTS],
        };
        rows.div_ceil(of_rows) * columns.div_ceil(of_columns)
    }

    /// How deep the parts of a product are: a multiple of a stage, or all of it where it is not cut. Depends on the extents alone.
    pub(super) fn part(self, [rows, columns, depth]: [usize; 3]) -> usize {
        let Cut { full, least } = self.cut();
        let parts = (full / self.tiles(rows, columns).max(1)).min(depth / least);
        if parts < 2 {
            return depth.max(1);
        }
        depth.div_ceil(parts).next_multiple_of(DEPTH)
    }
}

/// The depth of a stage.
const DEPTH: usize = 64;

/// What does a product on a machine.
pub(super) fn path<R: Runtime>(machine: Machine, product: &Product<'_, R>) -> Path {
    let [rows, columns, ..] = product.sizes;
    look_up(machine.is_hopper() && is_within_limits(product), rows, columns)
}

/// The most bytes that the parts of a product of `[M, N, K]` take: on one machine or the other, which a plan does not know. At most
/// `full` tiles of f32: 17 MB.
pub(crate) fn parts_bytes([rows, columns, depth]: [usize; 3]) -> usize {
    let on = |hopper| {
        let count = depth.div_ceil(look_up(hopper, rows, columns).part([rows, columns, depth]));
        if count < 2 {
            0
        } else {
            count * rows * columns * DType::F32.size_bytes()
        }
    };
    on(false).max(on(true))
}

fn look_up(hopper: bool, rows: usize, columns: usize) -> Path {
    let fits = LINES
        .iter()
        .find(|line| (hopper || !line.hopper) && rows <= line.most_rows && columns <= line.most_columns);
    fits.map_or(Path::Large, |line| line.path)
}

/// Whether Hopper's kernels can do a product at all.
fn is_within_limits<R: Runtime>(product: &Product<'_, R>) -> bool {
    let [rows, columns, depth, depth2] = product.sizes;
    let is_half = matches!(&product.out, Some((out, _)) if out.dtype() == DType::BF16);
    let row = if product.reads == Reads::Rows { depth } else { columns };
    let depth2 = product.second.map_or(0, |_| depth2);
    is_half && product.copy.is_none() && fits_hopper([rows, columns], [depth, depth2], weight_type(product.right), row)
}

/// Whether the copy engine can bring the factors and whole packs take the result away: rows of activations, weights and results
/// begin at 16 bytes, NF4 blocks do not cross rows, and rows are counted in 32 bits. A product of nothing is not within the limits.
pub(in crate::gpu) fn fits_hopper(sizes: [usize; 2], depths: [usize; 2], weight: DType, weight_row: usize) -> bool {
    let halves = MAP_GRANULE / 2;
    let granule = if weight == DType::U8 { NF4_BLOCK } else { halves };
    let [rows, columns] = sizes;
    let whole = [columns, depths[0], depths[1]]
        .iter()
        .all(|extent| extent.is_multiple_of(halves));
    let something = rows > 0 && columns > 0 && depths[0] > 0;
    whole && something && weight_row.is_multiple_of(granule) && i32::try_from(rows).is_ok()
}

/// Elements that share a scale.
const NF4_BLOCK: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hopper_does_what_is_neither_small_nor_beyond_its_limits() {
        let wide = Path::Hopper(Width::Wide);
        assert_eq!(look_up(true, 4_096, 12_288), wide);
        assert_eq!(look_up(true, 512, 12_288), Path::Hopper(Width::Middle));
        assert_eq!(look_up(true, 33, 65), Path::Hopper(Width::Narrow));
        // The adapter's first products, and few tokens.
        assert_eq!(look_up(true, 4_096, 16), Path::Small);
        assert_eq!(look_up(true, 32, 12_288), Path::Small);
        assert_eq!(look_up(false, 4_096, 12_288), Path::Large);
    }

    #[test]
    fn a_product_of_few_tiles_is_cut_in_depth_and_one_of_many_is_not() {
        let count = |path: Path, sizes: [usize; 3]| sizes[2].div_ceil(path.part(sizes));
        let [narrow, middle, wide] = [Width::Narrow, Width::Middle, Width::Wide].map(Path::Hopper);
        // y of 2048 → 12288 has tiles enough; dx has a sixth of them, six times as deep.
        assert_eq!(count(narrow, [64, 12_288, 2_048]), 1);
        assert_eq!(count(narrow, [64, 2_048, 12_288]), 8);
        assert_eq!(count(middle, [512, 2_048, 12_288]), 2);
        assert_eq!(count(wide, [4_096, 2_048, 12_288]), 1);
        // An adapter's first products.
        assert_eq!(count(Path::Small, [512, 16, 2_048]), 8);
        assert_eq!(count(Path::Small, [16_384, 16, 12_288]), 1);
        // Too shallow to be worth another launch.
        assert_eq!(count(Path::Small, [32, 64, 511]), 1);
        assert_eq!(count(Path::Large, [64, 128, 0]), 0);
    }

    #[test]
    fn parts_take_at_most_what_the_tiles_of_a_full_device_do() {
        assert_eq!(
            parts_bytes([64, 12_288, 2_048]),
            4 * 64 * 12_288 * 2,
            "two parts by large tiles, one by Hopper's"
        );
        assert_eq!(parts_bytes([4_096, 12_288, 2_048]), 0);
        assert_eq!(parts_bytes([4_096, 0, 2_048]), 0, "an adapter of rank 0");
        for rows in [1, 33, 64, 65, 200, 512, 513, 4_096] {
            for (columns, depth) in [(16, 12_288), (2_048, 4_096), (2_048, 12_288), (12_288, 2_048)] {
                assert!(
                    parts_bytes([rows, columns, depth]) <= 18_000_000,
                    "{rows} × {columns} × {depth}"
                );
            }
        }
    }

    #[test]
    fn parts_are_whole_stages_none_is_empty_and_they_reach_to_the_end() {
        for path in [Path::Small, Path::Large, Path::Hopper(Width::Middle)] {
            for depth in (1..40_000).step_by(61) {
                let part = path.part([64, 128, depth]);
                assert!(part >= depth || part.is_multiple_of(DEPTH) && (depth.div_ceil(part) - 1) * part < depth);
                assert!(part >= path.cut().least.min(depth), "{path:?} {depth}");
            }
        }
    }

    #[test]
    fn rows_that_the_copy_engine_cannot_begin_at_are_beyond_the_limits() {
        let layer = |sizes, depths, weight, row| fits_hopper(sizes, depths, weight, row);
        assert!(layer([100, 200], [64, 16], DType::U8, 64));
        assert!(layer([100, 200], [72, 0], DType::BF16, 72));
        assert!(
            !layer([100, 200], [72, 0], DType::U8, 72),
            "a block of codes crosses rows"
        );
        assert!(!layer([100, 200], [68, 0], DType::BF16, 68), "rows begin at 8 bytes");
        assert!(!layer([100, 200], [64, 4], DType::BF16, 64), "so do the adapter's");
        assert!(!layer([100, 201], [64, 0], DType::BF16, 64), "so do the result's");
        assert!(
            !layer([100, 200], [0, 0], DType::BF16, 64),
            "there is nothing to multiply"
        );
        assert!(
            !layer([1 << 31, 200], [64, 0], DType::BF16, 64),
            "coordinates have 32 bits"
        );
    }
}
