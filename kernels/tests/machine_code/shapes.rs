//! The shape that each matrix kernel is predicted for: layers of Qwen3-Next-80B-A3B (width 2048, 512 experts of 512, top 10, heads of the
//! delta rule 16 and 32 of 128, of attention 16 and 2 of 256, 151 936 tokens of vocabulary), and its tile.

/// What a launch multiplies and moves, at least.
pub struct Shape {
    pub text: String,
    pub flops: f64,
    pub bytes: f64,
}

const WIDTH: f64 = 2048.0;
const OUTPUTS: f64 = 12_288.0;
const INNER: f64 = 512.0;
const EXPERTS: f64 = 512.0;
const TOP: f64 = 10.0;
const VOCABULARY: f64 = 151_936.0;
const RANK: f64 = 16.0;
/// Bytes of an element in bf16, and in NF4 with its nested scale.
const HALF: f64 = 2.0;
const NF4: f64 = 0.5 + (1.0 + 4.0 / 256.0) / 64.0;

fn shape(text: String, flops: f64, bytes: f64) -> Option<Shape> {
    Some(Shape { text, flops, bytes })
}

/// The shape for an entry of a kernel; `None` for a kernel that this table does not know.
pub fn of(kernel: &str, entry: &str) -> Option<Shape> {
    let element = if entry.contains("_u8") { NF4 } else { HALF };
    let has = |part: &str| kernel.contains(part);
    match () {
        () if kernel == "product_outer" => {
            let tokens = 4096.0;
            let bytes = HALF * tokens * (RANK + WIDTH) + 4.0 * (tokens / 512.0) * RANK * WIDTH;
            shape("dA, T4096 R16 I2048".to_owned(), 2.0 * tokens * RANK * WIDTH, bytes)
        }
        () if kernel.starts_with("product_") => layer(if has("small") { 32.0 } else { 4096.0 }, element),
        () if kernel.starts_with("hopper_grouped_swiglu") => {
            opened(if has("narrow") { 1024.0 } else { 16_384.0 }, element)
        }
        () if kernel.starts_with("hopper_grouped_pair") => {
            paired(if has("narrow") { 1024.0 } else { 16_384.0 }, element)
        }
        () if kernel.starts_with("hopper_grouped_") => {
            experts(if has("narrow") { 1024.0 } else { 16_384.0 }, has("columns"), element)
        }
        () if kernel.starts_with("hopper_rows") || kernel.starts_with("hopper_columns") => {
            let tokens = match () {
                () if has("narrow") => 64.0,
                () if has("middle") => 512.0,
                () => 4096.0,
            };
            layer(tokens, element)
        }
        () if kernel.starts_with("grouped_") => grouped(kernel, element),
        () if kernel.starts_with("cross_entropy_") || has("logits") || has("head_dx") => {
            let tokens = 4096.0;
            let bytes = element * VOCABULARY * WIDTH + HALF * tokens * (WIDTH + VOCABULARY);
            shape(
                "T4096 C2048 V151936".to_owned(),
                2.0 * tokens * WIDTH * VOCABULARY,
                bytes,
            )
        }
        () if kernel.starts_with("attention_") || kernel.starts_with("hopper_attention_") => attention(kernel),
        () if kernel.starts_with("delta_") => delta(kernel),
        () => None,
    }
}

fn layer(tokens: f64, element: f64) -> Option<Shape> {
    let bytes = HALF * tokens * (OUTPUTS + WIDTH) + element * OUTPUTS * WIDTH;
    shape(format!("T{tokens} O12288 I2048"), 2.0 * tokens * OUTPUTS * WIDTH, bytes)
}

fn experts(tokens: f64, is_input: bool, element: f64) -> Option<Shape> {
    let rows = tokens * TOP;
    let activations = match is_input {
        true => rows * (INNER + WIDTH),
        false => tokens * WIDTH + rows * INNER,
    };
    shape(
        format!("T{tokens} E512 top10 O512 I2048"),
        2.0 * rows * INNER * WIDTH,
        HALF * activations + element * EXPERTS * INNER * WIDTH,
    )
}

/// Of the portable kernels for routed experts, at 4096 tokens.
fn grouped(kernel: &str, element: f64) -> Option<Shape> {
    let (tokens, rows) = (4096.0, 4096.0 * TOP);
    match kernel {
        "grouped_rows_wide" => experts(tokens, false, element),
        "grouped_columns_wide" => experts(tokens, true, element),
        "grouped_swiglu_wide" => opened(tokens, element),
        "grouped_pair_wide" => paired(tokens, element),
        "grouped_rows_narrow" => adapter("x Aᵀ", rows, tokens * WIDTH, WIDTH),
        "grouped_columns_narrow" => adapter("dy B", rows, rows * INNER, INNER),
        "grouped_pair_narrow" => adapter("dgate B, dup B", rows, 2.0 * rows * INNER, 2.0 * INNER),
        "grouped_outer" => adapter("dA", rows, tokens * WIDTH, WIDTH),
        _ => None,
    }
}

/// Gate and up in one, of which the activation is written.
fn opened(tokens: f64, element: f64) -> Option<Shape> {
    let rows = tokens * TOP;
    shape(
        format!("gate and up, T{tokens} E512 top10"),
        4.0 * rows * INNER * WIDTH,
        HALF * (tokens * WIDTH + rows * INNER) + 2.0 * element * EXPERTS * INNER * WIDTH,
    )
}

/// Their way back to the rows' inputs.
fn paired(tokens: f64, element: f64) -> Option<Shape> {
    let rows = tokens * TOP;
    shape(
        format!("dx of gate and up, T{tokens} E512 top10"),
        4.0 * rows * INNER * WIDTH,
        HALF * rows * (2.0 * INNER + WIDTH) + 2.0 * element * EXPERTS * INNER * WIDTH,
    )
}

/// A product with a factor of every expert's adapter, of rank 16 and so wide.
fn adapter(what: &str, rows: f64, read: f64, width: f64) -> Option<Shape> {
    shape(
        format!("{what}, T4096 E512 top10 R16"),
        2.0 * rows * RANK * width,
        HALF * read + 4.0 * rows * RANK + 4.0 * EXPERTS * RANK * width,
    )
}

/// 16 384 tokens in four documents. A kernel's own products: 2 forward, 3 for dq, 4 for dk and dv, 5 of them at heads of 256; 2 and 3
/// where each has a kernel of its own.
fn attention(kernel: &str) -> Option<Shape> {
    let (tokens, heads, keys) = (16_384.0, 16.0, 2.0);
    let dim: f64 = kernel.rsplit("head").next()?.parse().ok()?;
    let pairs = 4.0 * 4096.0 * 4097.0 / 2.0;
    let (products, tensors) = match () {
        () if kernel.contains("forward") => (2.0, 2.0 * heads + 2.0 * keys),
        () if kernel.contains("queries") => (3.0, 3.0 * heads + 2.0 * keys),
        () if kernel.contains("values") => (2.0, 2.0 * heads + 2.0 * keys),
        () if kernel.starts_with("hopper_") => (3.0, 2.0 * heads + 3.0 * keys),
        () => (if dim > 128.0 { 5.0 } else { 4.0 }, 2.0 * heads + 4.0 * keys),
    };
    shape(
        format!("T16384 docs4 H16 K2 D{dim}"),
        2.0 * products * pairs * heads * dim,
        HALF * tokens * dim * tensors,
    )
}

/// 8192 tokens, heads of 128, by the formulas in the heads of `gated_delta.cu` and `delta_carry.cu`; every tensor is counted once.
fn delta(kernel: &str) -> Option<Shape> {
    let (tokens, keys, heads, dim, chunk) = (8192.0, 16.0, 32.0, 128.0, 64.0);
    let (square, band) = (dim * dim, chunk * dim);
    let (narrow, wide) = (HALF * tokens * keys * dim, HALF * tokens * heads * dim);
    let (triangle, scores) = (4.0 * tokens * heads * chunk, HALF * tokens * heads * chunk);
    let states = HALF * tokens / chunk * heads * square;
    let (multiplied, bytes) = match () {
        () if kernel.starts_with("delta_products") => (band, 2.0 * narrow + scores),
        () if kernel.starts_with("delta_solve") => (band, narrow + triangle),
        () if kernel.starts_with("delta_forward") => {
            (3.0 * square + 2.0 * band, 2.0 * narrow + 2.0 * wide + triangle + scores)
        }
        () if kernel.starts_with("delta_states") => (2.0 * square + band, narrow + 2.0 * wide + triangle + states),
        () if kernel.starts_with("delta_reverse") => (
            3.0 * square + 2.0 * band,
            2.0 * narrow + 3.0 * wide + triangle + scores + states,
        ),
        () if kernel.starts_with("delta_factors") => (2.0 * band, narrow + 3.0 * wide + triangle),
        () if kernel.starts_with("delta_carry_forward") => (2.0 * square, narrow + 3.0 * wide + states),
        () if kernel.starts_with("delta_outputs") => (square + 2.0 * band, 2.0 * narrow + 2.0 * wide + states),
        () if kernel.starts_with("delta_pulls") => (square + 2.0 * band, 2.0 * narrow + 2.0 * wide + states),
        () if kernel.starts_with("delta_carry_back") => (2.0 * square, narrow + 3.0 * wide + 2.0 * states),
        () if kernel.starts_with("delta_residuals") => (band, 3.0 * wide + triangle),
        () if kernel.starts_with("delta_gradients") => {
            (3.0 * square + 6.0 * band, 4.0 * narrow + 4.0 * wide + 2.0 * states)
        }
        () => return None,
    };
    shape(
        "T8192 Hk16 Hv32 D128".to_owned(),
        2.0 * tokens * heads * multiplied,
        bytes,
    )
}

/// Tile and stages of a kernel, as its source has them.
pub fn tile(kernel: &str) -> &'static str {
    let has = |part: &str| kernel.contains(part);
    match () {
        () if kernel == "hopper_attention_forward_head64" => "128 × 128, ring of 4",
        () if kernel == "hopper_attention_forward_head256" => "128 × 80, ring of 2",
        () if kernel.starts_with("hopper_attention_forward") => "128 × 128, ring of 3",
        () if kernel == "hopper_attention_backward_values_head256" => "128 × 80, ring of 2",
        () if kernel.starts_with("hopper_attention_") && kernel.ends_with("head256") => "128 × 48, ring of 2",
        () if kernel.starts_with("hopper_attention_") && kernel.ends_with("head64") => "128 × 96, ring of 4",
        () if kernel.starts_with("hopper_attention_") => "128 × 96, ring of 3",
        () if kernel.starts_with("hopper_grouped_swiglu") && has("narrow") => "(64 + 64) × 64 × 64, ring of 8",
        () if kernel.starts_with("hopper_grouped_swiglu") => "(64 + 64) × 128 × 64, ring of 6 (NF4 8)",
        () if kernel.starts_with("hopper_") && has("narrow") => "128 × 64 × 64, ring of 8",
        () if kernel.starts_with("hopper_") && has("middle") => "128 × 128 × 64, ring of 6 (NF4 8)",
        () if kernel.starts_with("hopper_") && (has("wide") || has("logits") || has("head_dx")) => {
            "128 × 256 × 64, ring of 4 (NF4 5)"
        }
        () if has("large") || kernel.starts_with("cross_entropy_") => "128 × 128 × 64, 3",
        () if has("swiglu") => "64 × (64 + 64) × 64, 3",
        () if kernel.starts_with("grouped_") && has("wide") => "64 × 128 × 64, 3",
        () if has("small") || has("narrow") || has("outer") => "32 × 64 × 64, 4",
        () if kernel.starts_with("attention_forward_head256") => "64 × 32, 2",
        () if kernel.ends_with("head256") => "64 × 32, 1",
        () if kernel.starts_with("attention_forward_head64") || kernel.starts_with("attention_forward_head80") => {
            "128 × 64, 2"
        }
        () if kernel.starts_with("attention_forward") => "128 × 32, 2",
        () if kernel.starts_with("attention_backward_queries_head64") => "64 × 64, 2",
        () if kernel.starts_with("attention_backward") => "64 × 32, 2",
        () if kernel.starts_with("delta_carry") => "keys × 32, 2",
        () if ["factors", "outputs", "pulls", "residuals"]
            .iter()
            .any(|part| has(part)) =>
        {
            "64 × 64, 1"
        }
        () if kernel.starts_with("delta_") => "64 × 32 or 64, 1",
        () => "–",
    }
}
