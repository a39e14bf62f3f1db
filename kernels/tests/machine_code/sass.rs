//! What `nvdisasm` says: the instructions of each entry, and of the loop that does its work.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::cost::Cost;

/// How many instructions of each kind there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub all: usize,
    /// Tensor cores by a warp: HMMA.
    pub hmma: usize,
    /// Tensor cores by a warp group: HGMMA.
    pub hgmma: usize,
    /// f32 arithmetic and special functions.
    pub float: usize,
    /// Picking bits apart and converting: what decoding NF4 and bf16 is made of.
    pub decode: usize,
    /// Integer arithmetic, which is mostly addresses.
    pub integer: usize,
    /// Reads and writes of shared memory, and those by matrices.
    pub shared: usize,
    pub shared_matrices: usize,
    /// Asynchronous copies to shared memory: cp.async and TMA.
    pub copies: usize,
    /// Barriers and waits.
    pub barriers: usize,
    /// Reads and writes of global memory by their width in bytes.
    pub loads: BTreeMap<usize, usize>,
    pub stores: BTreeMap<usize, usize>,
    /// Reads and writes of local memory.
    pub local: usize,
}

/// An entry's instructions.
#[derive(Clone, Debug, PartialEq)]
pub struct Code {
    pub whole: Counts,
    /// The innermost loop with the most tensor-core instructions; where there are none, the longest innermost loop.
    pub main_loop: Option<Counts>,
    /// What that loop costs a warp.
    pub main_cost: Cost,
    /// The same of the outermost loop around it, or of everything where there is none: outside of the innermost loops with tensor
    /// instructions, and in those.
    pub around_cost: [Cost; 2],
    /// Exponentials between a wait that leaves a warp group's products under way and the next that does not: those that run beside them.
    pub exponentials_beside_products: usize,
}

struct Function<'a> {
    instructions: Vec<&'a str>,
    /// Before which instruction each label is.
    labels: BTreeMap<&'a str, usize>,
}

pub fn parse(text: &str) -> BTreeMap<String, Code> {
    let mut functions: BTreeMap<String, Function<'_>> = BTreeMap::new();
    let mut current: Option<&mut Function<'_>> = None;
    for line in text.lines() {
        let trimmed = line.trim();
        if let Some(name) = trimmed
            .strip_prefix(".section\t")
            .and_then(|rest| rest.trim().strip_prefix(".text."))
        {
            let name = name.split(',').next().unwrap().to_owned();
            let empty = Function {
                instructions: Vec::new(),
                labels: BTreeMap::new(),
            };
            current = Some(functions.entry(name).or_insert(empty));
        } else if trimmed.starts_with(".section\t") {
            current = None;
        } else if let Some(function) = &mut current {
            if let Some(label) = trimmed.strip_suffix(':') {
                function.labels.insert(label, function.instructions.len());
            } else if let Some(instruction) = instruction(trimmed) {
                function.instructions.push(instruction);
            }
        }
    }
    functions
        .into_iter()
        .map(|(name, function)| (name, function.code()))
        .collect()
}

/// The text after `/*0040*/`, without its predicate.
fn instruction(line: &str) -> Option<&str> {
    let (address, rest) = line.strip_prefix("/*")?.split_once("*/")?;
    u64::from_str_radix(address, 16).ok()?;
    let rest = rest.trim();
    let rest = match rest.strip_prefix('@') {
        Some(guarded) => guarded.split_once(char::is_whitespace)?.1.trim(),
        None => rest,
    };
    (!rest.is_empty()).then_some(rest)
}

impl Function<'_> {
    fn code(&self) -> Code {
        let loops = self.loops();
        let inner = innermost(&loops);
        let tensor = |range: &Range<usize>| {
            let counts = self.count(range.clone());
            counts.hmma + counts.hgmma
        };
        let main = inner
            .iter()
            .max_by_key(|range| (tensor(range), self.count((*range).clone()).all));
        let all = 0..self.instructions.len();
        let around = main.and_then(|main| {
            let outer = loops
                .iter()
                .filter(|range| range.start <= main.start && range.end >= main.end && *range != main);
            outer.max_by_key(|range| range.len()).cloned()
        });
        let around = around.unwrap_or_else(|| all.clone());
        let products = inner
            .iter()
            .filter(|range| range.start >= around.start && range.end <= around.end && tensor(range) > 0);
        // Where rare ways have loops of their own inside, the loop with the products is not the innermost one, and those are left out.
        let products_loop = loops
            .iter()
            .filter(|range| tensor(range) > 0)
            .min_by_key(|range| range.len());
        let main_cost = match (main, products_loop) {
            (Some(main), _) if tensor(main) > 0 => self.cost(main.clone()),
            (_, Some(outer)) => {
                let within = inner
                    .iter()
                    .filter(|range| range.start >= outer.start && range.end <= outer.end);
                within.fold(self.cost(outer.clone()), |sum, range| {
                    sum + self.cost(range.clone()) * -1.0
                })
            }
            _ => main.map_or_else(Cost::default, |range| self.cost(range.clone())),
        };
        let in_products = products.fold(Cost::default(), |sum, range| sum + self.cost(range.clone()));
        Code {
            whole: self.count(all),
            main_loop: main.map(|range| self.count(range.clone())),
            main_cost,
            around_cost: [self.cost(around) + in_products * -1.0, in_products],
            exponentials_beside_products: self.exponentials_beside_products(),
        }
    }

    fn exponentials_beside_products(&self) -> usize {
        let (mut under_way, mut count) = (false, 0);
        for instruction in &self.instructions {
            if let Some((_, left)) = instruction.split_once("WARPGROUP.DEPBAR.LE gsb0, ") {
                under_way = !left.starts_with("0x0");
            }
            count += usize::from(under_way && opcode(instruction) == "MUFU.EX2");
        }
        count
    }

    /// From a label to a branch back to it. The compiler ends code with a branch to itself, which is none.
    fn loops(&self) -> Vec<Range<usize>> {
        let mut loops = Vec::new();
        for (at, instruction) in self.instructions.iter().enumerate() {
            if !opcode(instruction).starts_with("BRA") {
                continue;
            }
            let label = instruction.split_once("`(").and_then(|(_, rest)| rest.split_once(')'));
            if let Some(start) = label.and_then(|(label, _)| self.labels.get(label))
                && *start < at
            {
                loops.push(*start..at + 1);
            }
        }
        loops
    }

    fn cost(&self, range: Range<usize>) -> Cost {
        let costs = self.instructions[range].iter().map(|instruction| Cost::of(instruction));
        costs.fold(Cost::default(), |sum, one| sum + one)
    }

    fn count(&self, range: Range<usize>) -> Counts {
        let mut counts = Counts::default();
        for instruction in &self.instructions[range] {
            counts.add(opcode(instruction));
        }
        counts
    }
}

/// Loops without another one inside.
fn innermost(loops: &[Range<usize>]) -> Vec<Range<usize>> {
    let has_inner = |outer: &Range<usize>| {
        let mut others = loops.iter().filter(|other| *other != outer);
        others.any(|other| other.start >= outer.start && other.end <= outer.end)
    };
    loops.iter().filter(|range| !has_inner(range)).cloned().collect()
}

fn opcode(instruction: &str) -> &str {
    instruction.split([' ', ';', '\t']).next().unwrap_or("")
}

impl Counts {
    fn add(&mut self, opcode: &str) {
        let stem = opcode.split('.').next().unwrap_or("");
        if stem == "NOP" {
            return;
        }
        self.all += 1;
        match stem {
            "HMMA" => self.hmma += 1,
            "HGMMA" => self.hgmma += 1,
            "LDSM" | "STSM" => self.shared_matrices += 1,
            "LDS" | "STS" => self.shared += 1,
            "LDGSTS" | "UTMALDG" | "UTMASTG" | "UBLKCP" => self.copies += 1,
            "LDG" | "LD" => *self.loads.entry(width(opcode)).or_default() += 1,
            "STG" | "ST" => *self.stores.entry(width(opcode)).or_default() += 1,
            "LDL" | "STL" => self.local += 1,
            "BAR" | "SYNCS" | "DEPBAR" | "WARPSYNC" | "LDGDEPBAR" | "WARPGROUP" => self.barriers += 1,
            "PRMT" | "LOP3" | "LOP" | "SHF" | "SHL" | "SHR" | "BFE" | "SGXT" | "F2F" | "F2FP" | "I2F" | "F2I"
            | "I2FP" | "HADD2" | "HMUL2" | "HFMA2" => self.decode += 1,
            "FADD" | "FMUL" | "FFMA" | "FMNMX" | "FSEL" | "FSETP" | "FSET" | "FCHK" | "MUFU" | "FADD2" | "FMUL2"
            | "FFMA2" => self.float += 1,
            "IMAD" | "IADD3" | "IADD" | "LEA" | "ISETP" | "IMNMX" | "IABS" | "UIADD3" | "UIMAD" | "ULEA" | "USHF"
            | "ULOP3" | "UISETP" | "VIADD" | "VIMNMX" | "IADD3X" => self.integer += 1,
            _ => {}
        }
    }
}

/// Bytes that an access of memory moves for each thread.
fn width(opcode: &str) -> usize {
    let parts: Vec<&str> = opcode.split('.').collect();
    match () {
        () if parts.contains(&"256") => 32,
        () if parts.contains(&"128") => 16,
        () if parts.contains(&"64") => 8,
        () if parts.contains(&"U16") || parts.contains(&"S16") || parts.contains(&"16") => 2,
        () if parts.contains(&"U8") || parts.contains(&"S8") || parts.contains(&"8") => 1,
        () => 4,
    }
}

#[test]
fn exponentials_run_beside_products_that_are_not_waited_for_yet() {
    let text = r#"
	.section	.text.attention_bf16,"ax",@progbits
attention_bf16:
        /*0000*/                   MUFU.EX2 R1, R1 ;
        /*0010*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0020*/                   MUFU.EX2 R2, R2 ;
        /*0030*/                   MUFU.RCP R3, R3 ;
        /*0040*/                   MUFU.EX2 R4, R4 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   MUFU.EX2 R5, R5 ;
"#;
    let code = parse(text).remove("attention_bf16").unwrap();
    assert_eq!(code.exponentials_beside_products, 2);
}

#[test]
fn instructions_are_counted_by_kind_and_in_the_loop_that_does_the_work() {
    let text = r#"
	.section	.text.product_bf16,"ax",@progbits
	.sectioninfo	@"SHI_REGISTERS=32"
        .global         product_bf16
product_bf16:
.text.product_bf16:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R8, [R20] ;
        /*0030*/                   HMMA.16816.F32.BF16 R12, R8, R4, R12 ;
        /*0040*/                   HMMA.16816.F32.BF16 R16, R8, R4, R16 ;
.L_x_2:
        /*0050*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   STG.E.U16 [R2.64], R5 ;
        /*0080*/                   LDL R3, [R1] ;
        /*0090*/               @P1 BRA `(.L_x_3) ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4);
        /*00c0*/                   NOP;
	.section	.nv.info,"",@"SHT_CUDA_INFO"
"#;
    let code = parse(text).remove("product_bf16").unwrap();
    let whole = &code.whole;
    assert_eq!(
        (whole.all, whole.hmma, whole.shared_matrices, whole.local, whole.integer),
        (12, 2, 1, 1, 1)
    );
    assert_eq!(
        (whole.loads.clone(), whole.stores.clone()),
        (BTreeMap::from([(16, 1)]), BTreeMap::from([(2, 1)]))
    );
    let main = code.main_loop.unwrap();
    assert_eq!((main.all, main.hmma, main.integer, main.local), (5, 2, 1, 0));
    assert_eq!((code.main_cost.issued, code.main_cost.tensor_flops), (5.0, 8192.0));
    // No loop is around it, so everything is.
    let [outside, inside] = code.around_cost;
    assert_eq!((outside.issued, inside.issued, inside.tensor_flops), (7.0, 5.0, 8192.0));
}
