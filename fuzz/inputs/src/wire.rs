// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Structured inputs as bytes, and bytes as structured inputs.
//!
//! Any bytes are an input: a tag is taken modulo what there is, and what is missing is zero. What a program writes is what a target
//! reads, so that seeds can be written as values; `arbitrary` leads one way only.

/// Something that an input is made of.
pub trait Field: Sized {
    /// Takes it from the front.
    fn take(bytes: &mut &[u8]) -> Self;

    /// Adds it at the end.
    fn put(&self, bytes: &mut Vec<u8>);
}

macro_rules! numbers {
    ($($number:ty),*) => {$(
        impl Field for $number {
            fn take(bytes: &mut &[u8]) -> Self {
                let mut field = [0; size_of::<$number>()];
                let taken = bytes.split_off(..field.len().min(bytes.len())).unwrap_or_default();
                field[..taken.len()].copy_from_slice(taken);
                <$number>::from_le_bytes(field)
            }

            fn put(&self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_le_bytes());
            }
        }
    )*};
}

numbers!(u8, u16, u32, u64);

impl Field for bool {
    fn take(bytes: &mut &[u8]) -> Self {
        u8::take(bytes) & 1 == 1
    }

    fn put(&self, bytes: &mut Vec<u8>) {
        bytes.push((*self).into());
    }
}

/// No more than 255 bytes, behind their number.
impl Field for Vec<u8> {
    fn take(bytes: &mut &[u8]) -> Self {
        let length = usize::from(u8::take(bytes)).min(bytes.len());
        bytes.split_off(..length).unwrap_or_default().to_vec()
    }

    fn put(&self, bytes: &mut Vec<u8>) {
        bytes.push(u8::try_from(self.len()).expect("a short field"));
        bytes.extend(self);
    }
}

/// All that is left, as values of one type; no more than a few, so that no input takes long.
pub fn all<T: Field>(mut bytes: &[u8]) -> Vec<T> {
    const MOST: usize = 64;
    let next = || (!bytes.is_empty()).then(|| T::take(&mut bytes));
    std::iter::from_fn(next).take(MOST).collect()
}

/// What [`all`] takes apart.
pub fn bytes_of<T: Field>(values: &[T]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for value in values {
        value.put(&mut bytes);
    }
    bytes
}

/// Makes a structure a [`Field`], made of its own.
macro_rules! record {
    ($(#[$attribute:meta])* $visibility:vis struct $name:ident { $($(#[$doc:meta])* pub $field:ident: $type:ty,)* }) => {
        $(#[$attribute])*
        $visibility struct $name { $($(#[$doc])* pub $field: $type,)* }

        impl $crate::wire::Field for $name {
            fn take(bytes: &mut &[u8]) -> Self {
                Self { $($field: $crate::wire::Field::take(bytes),)* }
            }

            fn put(&self, bytes: &mut Vec<u8>) {
                $(self.$field.put(bytes);)*
            }
        }
    };
}

/// Makes an enumeration a [`Field`]: a tag of one byte, and the fields of what it says.
macro_rules! operations {
    ($(#[$attribute:meta])* $visibility:vis enum $name:ident {
        $($(#[$doc:meta])* $variant:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* },)*
    }) => {
        $(#[$attribute])*
        $visibility enum $name { $($(#[$doc])* $variant { $($(#[$field_doc])* $field: $type,)* },)* }

        impl $crate::wire::Field for $name {
            fn take(bytes: &mut &[u8]) -> Self {
                let variants = [$(|bytes: &mut &[u8]| {
                    let _ = &bytes;
                    Self::$variant { $($field: $crate::wire::Field::take(bytes),)* }
                },)*];
                let tag = usize::from(<u8 as $crate::wire::Field>::take(bytes)) % variants.len();
                variants[tag](bytes)
            }

            fn put(&self, bytes: &mut Vec<u8>) {
                let names = [$(stringify!($variant),)*];
                let tag = |name| names.iter().position(|other| *other == name).expect("one of its own") as u8;
                match self {
                    $(Self::$variant { $($field,)* } => {
                        bytes.push(tag(stringify!($variant)));
                        $($field.put(bytes);)*
                    })*
                }
            }
        }
    };
}

pub(crate) use {operations, record};
