//! What instructions take of a multiprocessor's parts, for the roofline.

use std::ops::{Add, AddAssign, Mul};

/// What a warp asks of each part, in units that targets give cycles to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Instructions: one of a scheduler's slots each.
    pub issued: f64,
    /// Integers, logic, comparisons, selections, conversions to bf16.
    pub logic: f64,
    /// f32 additions and multiplications.
    pub float: f64,
    /// Integer multiplications, and what else is done by that half of the multipliers.
    pub multiply: f64,
    /// Exponentials, reciprocals and the like.
    pub special: f64,
    /// Of tensor instructions; a warp group's are a quarter for each of its warps.
    pub tensor_flops: f64,
    /// Bytes through shared memory, with bank conflicts left out; of a whole warp.
    pub shared_bytes: f64,
    /// Those of them that brought a left factor there: nothing where it stays for many products.
    pub brought_bytes: f64,
}

impl Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            issued: self.issued + other.issued,
            logic: self.logic + other.logic,
            float: self.float + other.float,
            multiply: self.multiply + other.multiply,
            special: self.special + other.special,
            tensor_flops: self.tensor_flops + other.tensor_flops,
            shared_bytes: self.shared_bytes + other.shared_bytes,
            brought_bytes: self.brought_bytes + other.brought_bytes,
        }
    }
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Mul<f64> for Cost {
    type Output = Self;

    fn mul(self, times: f64) -> Self {
        Self {
            issued: self.issued * times,
            logic: self.logic * times,
            float: self.float * times,
            multiply: self.multiply * times,
            special: self.special * times,
            tensor_flops: self.tensor_flops * times,
            shared_bytes: self.shared_bytes * times,
            brought_bytes: self.brought_bytes * times,
        }
    }
}

const LANES: f64 = 32.0;

impl Cost {
    /// Of one instruction, without its predicate.
    pub fn of(instruction: &str) -> Self {
        let opcode = instruction.split([' ', ';', '\t']).next().unwrap_or("");
        let mut parts = opcode.split('.');
        let stem = parts.next().unwrap_or("");
        let one = Self {
            issued: 1.0,
            ..Self::default()
        };
        match stem {
            "NOP" => Self::default(),
            "HMMA" => Self {
                tensor_flops: if parts.next() == Some("1688") { 2048.0 } else { 4096.0 },
                ..one
            },
            "HGMMA" => Self {
                ..one + group_product(instruction, opcode)
            },
            "LDS" | "STS" => Self {
                shared_bytes: LANES * access(opcode).max(4.0),
                ..one
            },
            // Eight rows of 16 bytes for each matrix.
            "LDSM" | "STSM" => Self {
                shared_bytes: 128.0 * matrices(opcode),
                ..one
            },
            "LDGSTS" => Self {
                shared_bytes: LANES * access(opcode),
                ..one
            },
            "MUFU" => Self { special: 1.0, ..one },
            "FADD" | "FMUL" | "FFMA" | "FADD2" | "FMUL2" | "FFMA2" | "HADD2" | "HMUL2" | "HFMA2" => {
                Self { float: 1.0, ..one }
            }
            "IMAD" => Self { multiply: 1.0, ..one },
            "PRMT" | "LOP3" | "LOP" | "SHF" | "SHL" | "SHR" | "BFE" | "SGXT" | "F2FP" | "I2FP" | "IADD3" | "IADD"
            | "LEA" | "ISETP" | "IMNMX" | "IABS" | "VIADD" | "VIMNMX" | "IADD3X" | "FMNMX" | "FSEL" | "FSETP"
            | "FSET" | "SEL" | "PLOP3" | "MOV" => Self { logic: 1.0, ..one },
            _ => one,
        }
    }
}

/// `HGMMA.64x256x16.F32.BF16 R24, R120, gdesc[UR8], R24`: a warp group's 64 × N × 16. What it reads of shared memory are 16 × N tokens,
/// and 64 × 16 of the left factor if that is not in registers; what was copied there before is those once for both groups (tokens), or
/// its own (the left factor, or its codes).
fn group_product(instruction: &str, opcode: &str) -> Cost {
    let extents = opcode.split('.').nth(1).unwrap_or("");
    let columns: f64 = extents
        .split('x')
        .nth(1)
        .and_then(|text| text.parse().ok())
        .unwrap_or(0.0);
    let operands = instruction.split_once(' ').map_or("", |(_, rest)| rest);
    let left = operands.split(',').nth(1).map_or("", str::trim);
    let (tokens, left_bytes) = (16.0 * columns * 2.0, 64.0 * 16.0 * 2.0);
    let from_registers = left.starts_with('R') && !left.starts_with("RZ");
    let (read, brought) = match from_registers {
        true => (tokens, left_bytes / 4.0),
        false => (tokens + left_bytes, left_bytes),
    };
    Cost {
        tensor_flops: 2.0 * 64.0 * columns * 16.0 / 4.0,
        shared_bytes: (read + tokens / 2.0 + brought) / 4.0,
        brought_bytes: brought / 4.0,
        ..Cost::default()
    }
}

/// Bytes that a lane moves.
fn access(opcode: &str) -> f64 {
    let width = |bits: &str| opcode.split('.').any(|part| part == bits);
    match () {
        () if width("128") => 16.0,
        () if width("64") => 8.0,
        () if width("U16") || width("S16") => 2.0,
        () if width("U8") || width("S8") => 1.0,
        () => 4.0,
    }
}

fn matrices(opcode: &str) -> f64 {
    match opcode.rsplit('.').next() {
        Some("4") => 4.0,
        Some("2") => 2.0,
        _ => 1.0,
    }
}

#[test]
fn instructions_cost_what_they_move_and_multiply() {
    let tensor = |text: &str| (Cost::of(text).tensor_flops, Cost::of(text).shared_bytes);
    assert_eq!(tensor("HMMA.16816.F32.BF16 R12, R8, R4, R12 ;"), (4096.0, 0.0));
    // A quarter of 2 · 64 · 256 · 16, and of 8 KB of tokens with half of what was copied, and the codes.
    assert_eq!(
        tensor("HGMMA.64x256x16.F32.BF16 R24, R120, gdesc[UR8], R24 ;"),
        (131_072.0, (8192.0 + 4096.0 + 512.0) / 4.0)
    );
    assert_eq!(
        tensor("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;"),
        (32_768.0, (2048.0 + 1024.0 + 4096.0) / 4.0)
    );
    assert_eq!(tensor("LDSM.16.M88.4 R8, [R20] ;"), (0.0, 512.0));
    assert_eq!(tensor("LDS.64 R8, [R20] ;"), (0.0, 256.0));
    assert_eq!(tensor("LDGSTS.E.BYPASS.128 [R1], [R2.64] ;"), (0.0, 512.0));
    let logic = Cost::of("LOP3.LUT R1, R2, 0xf, RZ, 0xc0, !PT ;");
    assert_eq!((logic.logic, logic.issued, logic.multiply), (1.0, 1.0, 0.0));
    assert_eq!(Cost::of("NOP;"), Cost::default());
}
