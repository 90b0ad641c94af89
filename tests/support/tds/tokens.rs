//! What a TDS 7.4 server sends: tokens, and tables of every type that a product has, after MS-TDS.

/// Collation Latin1_General_CI_AS, code page 1252.
const COLLATION: [u8; 5] = [0x09, 0x04, 0xd0, 0x00, 0x34];

/// The type of a column. Sizes are in bytes, as sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// tinyint to bigint.
    Int(u8),
    /// smallmoney, money.
    Money(u8),
    /// Precision, scale.
    Decimal(u8, u8),
    /// smalldatetime, datetime.
    DateTime(u8),
    /// Digits after the second.
    DateTime2(u8),
    Date,
    Guid,
    /// Characters; 0: max.
    NVarchar(u16),
    /// 0: max.
    VarBinary(u16),
}

/// A column; one that cannot be NULL is of another type on the wire.
#[derive(Clone, Debug)]
pub struct Column {
    pub name: String,
    pub kind: Type,
    pub nullable: bool,
}

/// A value, as it is kept.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    Null,
    Int(i64),
    /// Of money (four digits after the point) and decimals: all digits.
    Digits(i128),
    /// Days since 1900; 300ths of a second, or minutes of a smalldatetime.
    DateTime(i32, u32),
    /// Days since the year 1; units of the last digit. Of a date, the days alone.
    DateTime2(u32, u64),
    Guid(&'static str),
    Text(String),
    /// Text that is not Unicode.
    Utf16(Vec<u16>),
    Bytes(Vec<u8>),
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

/// One result set.
#[derive(Clone, Debug, Default)]
pub struct Table {
    pub columns: Vec<Column>,
    pub rows: Vec<Vec<Cell>>,
}

/// A message to be sent.
#[derive(Default)]
pub struct Tokens(pub Vec<u8>);

impl Tokens {
    fn short_text(&mut self, text: &str) {
        let units: Vec<_> = text.encode_utf16().collect();
        self.0.push(units.len() as u8);
        self.0.extend(units.iter().flat_map(|unit| unit.to_le_bytes()));
    }

    fn long_text(&mut self, text: &str) {
        let units: Vec<_> = text.encode_utf16().collect();
        self.0.extend((units.len() as u16).to_le_bytes());
        self.0.extend(units.iter().flat_map(|unit| unit.to_le_bytes()));
    }

    fn sized(&mut self, token: u8, fill: impl FnOnce(&mut Self)) {
        let mut body = Self::default();
        fill(&mut body);
        self.0.push(token);
        self.0.extend((body.0.len() as u16).to_le_bytes());
        self.0.extend(body.0);
    }

    /// The answer to a login.
    pub fn welcome(&mut self, database: &str, with_token: bool) {
        self.environment(1, database, "master");
        self.environment(4, "4096", "4096");
        self.sized(0xad, |body| {
            body.0.extend([1, 0x74, 0, 0, 4]);
            body.short_text("Microsoft SQL Server");
            body.0.extend([16, 0, 16, 0]);
        });
        if with_token {
            self.0.extend([0xae, 2, 0, 0, 0, 0, 0xff]);
        }
    }

    fn environment(&mut self, kind: u8, new: &str, old: &str) {
        self.sized(0xe3, |body| {
            body.0.push(kind);
            body.short_text(new);
            body.short_text(old);
        });
    }

    /// "Log in over there instead."
    pub fn route(&mut self, host: &str, port: u16) {
        self.sized(0xe3, |body| {
            body.0.push(20);
            let mut value = Self(vec![0]);
            value.0.extend(port.to_le_bytes());
            value.long_text(host);
            body.0.extend((value.0.len() as u16).to_le_bytes());
            body.0.extend(value.0);
            body.0.extend([0, 0]);
        });
    }

    pub fn error(&mut self, number: u32, class: u8, message: &str) {
        self.sized(0xaa, |body| {
            body.0.extend(number.to_le_bytes());
            body.0.extend([1, class]);
            body.long_text(message);
            body.short_text("fake");
            body.short_text("");
            body.0.extend(1_u32.to_le_bytes());
        });
    }

    /// The end of everything; with the error bit if there was one.
    pub fn done(&mut self, failed: bool) {
        self.end(0xfd, if failed { 2 } else { 0 }, 0);
    }

    /// The acknowledgement of an attention.
    pub fn cancelled(&mut self) {
        self.end(0xfd, 0x20, 0);
    }

    /// The end of a called procedure.
    pub fn returned(&mut self) {
        self.0.extend([0x79, 0, 0, 0, 0]);
        self.end(0xfe, 0, 0);
    }

    fn end(&mut self, token: u8, status: u16, rows: u64) {
        self.0.push(token);
        self.0.extend(status.to_le_bytes());
        self.0.extend([0xc1, 0]);
        self.0.extend(rows.to_le_bytes());
    }

    pub fn table(&mut self, table: &Table) {
        self.0.push(0x81);
        self.0.extend((table.columns.len() as u16).to_le_bytes());
        for column in &table.columns {
            self.0.extend([0, 0, 0, 0, u8::from(column.nullable), 0]);
            self.kind(column);
            self.short_text(&column.name);
        }
        for row in &table.rows {
            assert_eq!(row.len(), table.columns.len(), "a cell per column");
            self.row(&table.columns, row);
        }
        self.end(0xff, 0x11, table.rows.len() as u64); // one statement of a procedure; more follows
    }

    fn row(&mut self, columns: &[Column], row: &[Cell]) {
        // As SQL Server does: where many are NULL, a bitmap says so.
        let compressed = row.iter().filter(|cell| **cell == Cell::Null).count() > 2;
        self.0.push(if compressed { 0xd2 } else { 0xd1 });
        if compressed {
            let mut bitmap = vec![0_u8; row.len().div_ceil(8)];
            for (index, _) in row.iter().enumerate().filter(|(_, cell)| **cell == Cell::Null) {
                bitmap[index / 8] |= 1 << (index % 8);
            }
            self.0.extend(bitmap);
        }
        for (column, cell) in columns.iter().zip(row) {
            if *cell != Cell::Null || !compressed {
                self.cell(column, cell);
            }
        }
    }

    fn kind(&mut self, column: &Column) {
        let fixed = match column.kind {
            _ if column.nullable => None,
            Type::Int(1) => Some(0x30),
            Type::Int(2) => Some(0x34),
            Type::Int(4) => Some(0x38),
            Type::Int(8) => Some(0x7f),
            Type::Money(4) => Some(0x7a),
            Type::Money(8) => Some(0x3c),
            Type::DateTime(4) => Some(0x3a),
            Type::DateTime(8) => Some(0x3d),
            _ => None,
        };
        if let Some(fixed) = fixed {
            return self.0.push(fixed);
        }
        match column.kind {
            Type::Int(size) => self.0.extend([0x26, size]),
            Type::Money(size) => self.0.extend([0x6e, size]),
            Type::Decimal(precision, scale) => self.0.extend([0x6a, 17, precision, scale]),
            Type::DateTime(size) => self.0.extend([0x6f, size]),
            Type::DateTime2(scale) => self.0.extend([0x2a, scale]),
            Type::Date => self.0.push(0x28),
            Type::Guid => self.0.extend([0x24, 16]),
            Type::NVarchar(characters) => {
                self.0.push(0xe7);
                self.0.extend(if characters == 0 { 0xffff } else { characters * 2 }.to_le_bytes());
                self.0.extend(COLLATION);
            }
            Type::VarBinary(size) => {
                self.0.push(0xa5);
                self.0.extend(if size == 0 { 0xffff } else { size }.to_le_bytes());
            }
        }
    }

    fn cell(&mut self, column: &Column, cell: &Cell) {
        let value = match (column.kind, cell) {
            (_, Cell::Null) => None,
            (Type::Int(size), Cell::Int(number)) => Some(number.to_le_bytes()[..usize::from(size)].to_vec()),
            (Type::Money(4), Cell::Digits(digits)) => Some((*digits as i32).to_le_bytes().to_vec()),
            // The upper half comes first.
            (Type::Money(_), Cell::Digits(digits)) => {
                let bytes = (*digits as i64).to_le_bytes();
                Some([&bytes[4..], &bytes[..4]].concat())
            }
            (Type::Decimal(precision, _), Cell::Digits(digits)) => {
                let size = [4, 8, 12, 16][[10, 20, 29].iter().filter(|more| precision >= **more).count()];
                let mut bytes = vec![u8::from(*digits >= 0)];
                bytes.extend(&digits.unsigned_abs().to_le_bytes()[..size]);
                Some(bytes)
            }
            (Type::DateTime(4), Cell::DateTime(days, minutes)) => {
                Some([(*days as u16).to_le_bytes(), (*minutes as u16).to_le_bytes()].concat())
            }
            (Type::DateTime(_), Cell::DateTime(days, ticks)) => {
                Some([days.to_le_bytes(), ticks.to_le_bytes()].concat())
            }
            (Type::DateTime2(scale), Cell::DateTime2(days, units)) => {
                let size = [3, 3, 3, 4, 4, 5, 5, 5][usize::from(scale)];
                Some([&units.to_le_bytes()[..size], &days.to_le_bytes()[..3]].concat())
            }
            (Type::Date, Cell::DateTime2(days, _)) => Some(days.to_le_bytes()[..3].to_vec()),
            // The first three groups are little-endian numbers.
            (Type::Guid, Cell::Guid(text)) => {
                let digits = text.replace('-', "");
                let mut bytes: Vec<_> =
                    (0..16).map(|at| u8::from_str_radix(&digits[at * 2..at * 2 + 2], 16).expect("hex")).collect();
                bytes[..4].reverse();
                bytes[4..6].reverse();
                bytes[6..8].reverse();
                Some(bytes)
            }
            (Type::NVarchar(_), Cell::Text(text)) => Some(text.encode_utf16().flat_map(u16::to_le_bytes).collect()),
            (Type::NVarchar(_), Cell::Utf16(units)) => Some(units.iter().copied().flat_map(u16::to_le_bytes).collect()),
            (Type::VarBinary(_), Cell::Bytes(bytes)) => Some(bytes.clone()),
            (kind, cell) => panic!("{cell:?} in {}, a column of type {kind:?}", column.name),
        };
        match column.kind {
            Type::NVarchar(0) | Type::VarBinary(0) => self.chunks(value),
            Type::NVarchar(_) | Type::VarBinary(_) => {
                self.0.extend(value.as_ref().map_or(0xffff, |value| value.len() as u16).to_le_bytes());
                self.0.extend(value.unwrap_or_default());
            }
            Type::Int(_) | Type::Money(_) | Type::DateTime(_) if !column.nullable => {
                self.0.extend(value.expect("no NULL in such a column"));
            }
            _ => {
                self.0.push(value.as_ref().map_or(0, |value| value.len() as u8));
                self.0.extend(value.unwrap_or_default());
            }
        }
    }

    /// A value of any length, in pieces.
    fn chunks(&mut self, value: Option<Vec<u8>>) {
        let Some(value) = value else { return self.0.extend(u64::MAX.to_le_bytes()) };
        self.0.extend((value.len() as u64).to_le_bytes());
        for piece in value.chunks(1000) {
            self.0.extend((piece.len() as u32).to_le_bytes());
            self.0.extend(piece);
        }
        self.0.extend(0_u32.to_le_bytes());
    }
}
