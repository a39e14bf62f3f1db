//! What `cuobjdump --dump-resource-usage` says.

use std::collections::BTreeMap;

/// What a thread or a block of an entry takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: usize,
    /// Bytes of a thread's frame in local memory: spilled registers and arrays that are indexed at run time.
    pub stack_bytes: usize,
    /// Bytes of a block's shared memory that the code itself asks for.
    pub shared_bytes: usize,
    /// Further bytes of local memory of a thread.
    pub local_bytes: usize,
}

/// Shared memory of every block that the hardware keeps for itself.
pub const RESERVED_SHARED_BYTES: usize = 1024;

impl Resources {
    /// From compute capability 9.0 on the compiler counts what the hardware keeps among what the code asks for, if it asks for any.
    pub fn without_reserved(self, capability: u32) -> Self {
        let reserved = if capability >= 90 { RESERVED_SHARED_BYTES } else { 0 };
        Self {
            shared_bytes: self.shared_bytes.saturating_sub(reserved),
            ..self
        }
    }
}

pub fn parse(text: &str) -> BTreeMap<String, Resources> {
    let mut found = BTreeMap::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(name) = line.trim().strip_prefix("Function ") else {
            continue;
        };
        let usage = lines.next().unwrap_or_else(|| panic!("nothing after {line}"));
        let number = |key: &str| -> usize {
            let field = usage
                .split_whitespace()
                .find_map(|field| field.strip_prefix(key)?.strip_prefix(':'));
            field.unwrap_or_else(|| panic!("no {key} in {usage}")).parse().unwrap()
        };
        let resources = Resources {
            registers: number("REG"),
            stack_bytes: number("STACK"),
            shared_bytes: number("SHARED"),
            local_bytes: number("LOCAL"),
        };
        found.insert(name.trim_end_matches(':').to_owned(), resources);
    }
    found
}

#[test]
fn resource_usage_is_read() {
    let text = "
Resource usage:
 Common:
  GLOBAL:25 CONSTANT[4]:56
 Function add_f32:
  REG:47 STACK:8 SHARED:1056 LOCAL:16 CONSTANT[0]:588 TEXTURE:0 SURFACE:0 SAMPLER:0
";
    let wanted = Resources {
        registers: 47,
        stack_bytes: 8,
        shared_bytes: 1056,
        local_bytes: 16,
    };
    assert_eq!(parse(text), BTreeMap::from([("add_f32".to_owned(), wanted)]));
    assert_eq!(
        (
            wanted.without_reserved(80).shared_bytes,
            wanted.without_reserved(90).shared_bytes
        ),
        (1056, 32)
    );
}
