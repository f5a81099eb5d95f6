package wire

// Attach asks for what the container writes from now on, in pipes whose write
// ends came along, in this order.
type Attach struct {
	Stdin          bool // the client is going to send input, too
	Stdout, Stderr bool
}

// Resize sets the size of the container's terminal, in characters.
type Resize struct{ Width, Height uint16 }

func (a Attach) Append(b *Builder, call uint32) error {
	b.Begin(TypeAttach, call)
	b.Bool(1, a.Stdin)
	b.Bool(2, a.Stdout)
	b.Bool(3, a.Stderr)
	return b.End()
}

func (a *Attach) Decode(f Fields) error {
	return f.each(func(tag byte, p []byte) error {
		switch tag {
		case 1:
			return setBool(&a.Stdin, p)
		case 2:
			return setBool(&a.Stdout, p)
		case 3:
			return setBool(&a.Stderr, p)
		}
		return nil
	})
}

func (r Resize) Append(b *Builder, call uint32) error {
	b.Begin(TypeResize, call)
	b.Uint(1, uint64(r.Width))
	b.Uint(2, uint64(r.Height))
	return b.End()
}

func (r *Resize) Decode(f Fields) error {
	return f.each(func(tag byte, p []byte) error {
		switch tag {
		case 1:
			return setUint16(&r.Width, p)
		case 2:
			return setUint16(&r.Height, p)
		}
		return nil
	})
}

func setUint16(v *uint16, p []byte) error {
	n, err := Uint(p)
	*v = uint16(min(n, 1<<16-1))
	return err
}
