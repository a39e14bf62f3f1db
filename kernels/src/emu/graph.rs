//! Captured work: launches and fills with all they need to be done again.

use std::sync::Arc;

use super::ffi::Memory;
use crate::gpu::{Launch, Source, Span, Swizzle, TensorMap, Value};

/// Launches and fills in their order.
#[derive(Default)]
pub struct Graph {
    pub(super) nodes: Vec<Node>,
}

/// One launch or fill.
#[derive(Clone, PartialEq)]
pub(super) enum Node {
    Fill {
        part: Part,
        byte: u8,
    },
    Launch {
        source: &'static Source,
        entry: String,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        values: Vec<Kept>,
    },
}

/// A part of a block, which it keeps alive.
#[derive(Clone)]
pub(super) struct Part {
    memory: Arc<Memory>,
    first: usize,
    bytes: usize,
}

/// An argument.
#[derive(Clone, PartialEq)]
pub(super) enum Kept {
    Memory(Option<Part>),
    /// A table of addresses, and what these name.
    Addresses(Option<Part>, Vec<Part>),
    I32(i32),
    I64(i64),
    /// Its bits.
    F32(u32),
    Map {
        part: Part,
        element_bytes: u32,
        extents: [u64; 3],
        strides: [u64; 2],
        rectangle: [u32; 3],
        swizzle: Swizzle,
    },
}

impl Graph {
    /// What the launches are, in order: two graphs that agree do the same to the same memory.
    pub fn agrees(&self, other: &Self) -> bool {
        self.nodes == other.nodes
    }

    /// How many launches it has.
    pub fn launches(&self) -> usize {
        let is_launch = |node: &&Node| matches!(node, Node::Launch { .. });
        self.nodes.iter().filter(is_launch).count()
    }
}

impl PartialEq for Part {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.memory, &other.memory) && (self.first, self.bytes) == (other.first, other.bytes)
    }
}

impl Part {
    pub(super) fn of(span: Span<'_, Memory>) -> Self {
        Self {
            memory: Arc::clone(span.memory),
            first: span.first,
            bytes: span.bytes,
        }
    }

    pub(super) fn span(&self) -> Span<'_, Memory> {
        Span {
            memory: &self.memory,
            first: self.first,
            bytes: self.bytes,
        }
    }
}

impl Kept {
    fn of(value: &Value<'_, Memory>) -> Self {
        match value {
            Value::Memory(span) => Self::Memory(span.map(Part::of)),
            Value::Addresses { table, named } => {
                Self::Addresses(table.map(Part::of), named.iter().copied().map(Part::of).collect())
            }
            Value::I32(value) => Self::I32(*value),
            Value::I64(value) => Self::I64(*value),
            Value::F32(value) => Self::F32(value.to_bits()),
            Value::Map(map) => Self::Map {
                part: Part::of(map.part),
                element_bytes: map.element_bytes,
                extents: map.extents,
                strides: map.strides,
                rectangle: map.rectangle,
                swizzle: map.swizzle,
            },
        }
    }

    pub(super) fn value(&self) -> Value<'_, Memory> {
        match self {
            Self::Memory(part) => Value::Memory(part.as_ref().map(Part::span)),
            Self::Addresses(table, named) => Value::Addresses {
                table: table.as_ref().map(Part::span),
                named: named.iter().map(Part::span).collect(),
            },
            Self::I32(value) => Value::I32(*value),
            Self::I64(value) => Value::I64(*value),
            Self::F32(bits) => Value::F32(f32::from_bits(*bits)),
            Self::Map {
                part,
                element_bytes,
                extents,
                strides,
                rectangle,
                swizzle,
            } => Value::Map(TensorMap {
                part: part.span(),
                element_bytes: *element_bytes,
                extents: *extents,
                strides: *strides,
                rectangle: *rectangle,
                swizzle: *swizzle,
            }),
        }
    }
}

impl Node {
    pub(super) fn launch(launch: &Launch<'_, Memory>) -> Self {
        Self::Launch {
            source: launch.source,
            entry: launch.entry.to_owned(),
            grid: launch.grid,
            threads: launch.threads,
            shared_bytes: launch.shared_bytes,
            values: launch.values.iter().map(Kept::of).collect(),
        }
    }
}
